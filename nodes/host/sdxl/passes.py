"""The passes of an SDXL-like U-Net in one sampling run: what is prepared before, and the wrappers
that give each forward pass its :class:`~....anystory_core.injection.call.Call`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....anystory_core.injection.call import Call, Recording, Shown
from ....anystory_core.injection.prepare import PreparedSubjects, prepare_subjects
from ....anystory_core.injection.rows import Rows
from ....anystory_core.routing.grids import Crop
from ....anystory_core.routing.modes import build_source
from ....anystory_core.routing.record import RoutingRecord
from ..base import RunRequest
from ..conds import Evaluation, Roles
from ..ids import CALL_KEY, EVALUATION_KEY, WRAPPER_KEY
from ..managed import load, release
from ..texts import route_texts
from ..windows import Window
from .patcher import HostAttention, install


@dataclass
class UNetPasses:
    """The passes of a U-Net in one sampling run: the inner wrappers, and what they share."""

    prepared: PreparedSubjects
    windows: tuple[Window, ...]
    record: RoutingRecord
    roles: Roles
    precision: Any  # of attention, where the user forces one
    unet: Any
    fresh: bool = True  # the next call is the first of a model evaluation

    def active(self, sigma: float) -> tuple[bool, ...]:
        return tuple(window.holds(sigma) for window in self.windows)

    def installed(self, before: dict[str, Any]) -> dict[str, Any]:
        """A copy of the guider's transformer options with this run's patches and wrappers."""
        options = comfy.patcher_extension.copy_nested_dicts(before)
        install(options, self.record.sites, self.unet)
        for kind, wrapper in (
            (WrappersMP.PREDICT_NOISE, self.predict_noise),
            (WrappersMP.CALC_COND_BATCH, self.calc_cond_batch),
            (WrappersMP.DIFFUSION_MODEL, self.diffusion_model),
        ):
            comfy.patcher_extension.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper, options)
        return options

    # The inner wrappers, outermost first.

    def predict_noise(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the guided model; its first call is the one that may be recorded."""
        self.fresh = True
        return executor(*args, **kwargs)

    def calc_cond_batch(
        self,
        executor: Callable[..., Any],
        model: Any,
        conds: list[Any],
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any],
    ) -> Any:
        """Tells the calls inside which ``conds`` index is conditional. ``cond_or_uncond`` alone
        does not: SAG runs the negative as number 0, DualCFG has two positives."""
        options = dict(model_options.get("transformer_options", {}))
        options[EVALUATION_KEY] = Evaluation.of(self.roles, conds, x, timestep)
        return executor(
            model, conds, x, timestep, {**model_options, "transformer_options": options}
        )

    def diffusion_model(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Hands a fresh :class:`Call` to the patches of this forward pass."""
        position = 5  # x, timesteps, context, y, control, transformer_options
        values = list(args)
        options = values[position] if len(values) > position else kwargs["transformer_options"]
        options = {**options, CALL_KEY: self._begin(options, values[0])}
        if len(values) > position:
            values[position] = options
        else:
            kwargs["transformer_options"] = options
        return executor(*values, **kwargs)

    @torch.compiler.disable
    def _begin(self, options: dict[str, Any], x: Tensor) -> Call | None:
        sigma = float(options["sigmas"][0])
        active = self.active(sigma)
        if self.prepared.is_idle(active):
            self.record.begin_step(sigma, active)
            return None
        chunks: list[int] = options["cond_or_uncond"]
        uuids: list[Any] = options.get("uuids", [None] * len(chunks))
        evaluation: Evaluation = options.get(
            EVALUATION_KEY, Evaluation(recorded=(0, self.roles.first_positive))
        )
        size, times = evaluation.layout(len(chunks), x)
        cond: list[int] = []
        uncond: list[int] = []
        crops: list[Crop | None] = [None] * x.shape[0]
        apart: list[int] = []
        record: tuple[int, ...] = ()
        routed: list[tuple[int, Any, Crop | None]] = []
        for place, (index, uuid) in enumerate(zip(chunks, uuids, strict=True)):
            firsts = range(place * size, times * size * len(chunks), size * len(chunks))
            rows = [row for first in firsts for row in range(first, first + size)]
            (cond if evaluation.is_cond(index) else uncond).extend(rows)
            crop = evaluation.crop(uuid, x)
            if evaluation.is_cond(index) or self.prepared.keep_references_in_uncond:
                routed.append((index, uuid, crop))
            for row in rows:
                crops[row] = crop
            if crop is not None or uuid in evaluation.masked:
                apart.extend(rows)
            if self.fresh and uuid is not None and (index, uuid) == evaluation.recorded:
                if evaluation.is_tile(crop, x):
                    self.record.tiled = True  # its routes are not the picture's
                else:
                    record = tuple(rows[:size])
        if record:
            self.fresh = False
            self.record.begin_step(sigma, active)
        return Call(
            self.prepared,
            Rows(tuple(cond), tuple(uncond)),
            active,
            self.record.sites,
            HostAttention(options, self.precision),
            Shown(
                crops=tuple(crops) if any(crops) else (),
                apart=tuple(apart),
                kind=evaluation.kind(routed, size * times, x),
            ),
            Recording(self.record, record) if record else None,
        )


def windows_of(request: RunRequest) -> tuple[Window, ...] | None:
    """Percents become noise levels: own window and overall window together. None: all strengths
    are 0 or all windows empty."""
    model, settings = request.guider.model_patcher, request.settings
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    subjects = request.routing.subjects
    windows = tuple(
        Window(
            float(to_sigma(max(request.start, subject.options.start))),
            float(to_sigma(min(request.end, subject.options.end))),
        )
        for subject in subjects
    )
    acts = any(
        window.start > window.end
        and (
            settings.strength * subject.options.strength > 0
            or settings.reference_strength * subject.options.reference_strength > 0
        )
        for subject, window in zip(subjects, windows, strict=True)
    )
    return windows if acts else None


def prepare_passes(
    request: RunRequest, windows: tuple[Window, ...], routers: Sequence[Any]
) -> UNetPasses:
    """Project the subjects for a run."""
    routing, guider, advance = request.routing, request.guider, request.advance
    anystory, subjects = routing.anystory, routing.subjects
    model = guider.model_patcher
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    device = model.load_device
    roles = Roles.of(guider)
    texts = None
    if routing.mode.startswith("text"):
        texts = route_texts(routing.labels, model, device)
    load([*anystory.having("projections"), *routers])
    advance(1)
    try:
        moved = [s.map(lambda x: x.to(device, dtype)) for s in subjects]
        source = build_source(routing.mode, anystory.model, moved, routing.masks, texts)
        agree = routing.agree and routing.mode == "learned"
        prepared = prepare_subjects(anystory.model, moved, source, request.settings, agree=agree)
    finally:
        release(anystory.having("projections"))
    advance(1)
    unet = model.model.diffusion_model
    precision = _attention_precision(unet)
    return UNetPasses(prepared, windows, request.record, roles, precision, unet)


def _attention_precision(unet: Any) -> Any:
    """The U-Net's own attention precision (None unless the user forces upcasting)."""
    for module in unet.modules():
        if hasattr(module, "attn_precision"):
            return module.attn_precision
    return None
