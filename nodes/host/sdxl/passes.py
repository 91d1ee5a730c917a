"""The passes of an SDXL-like U-Net in one sampling run: what is prepared before, and the wrappers
that give each forward pass its :class:`~....anystory_core.injection.call.Call`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from ....anystory_core.errors import RoutingError
from ....anystory_core.injection.call import Call, Recording, Shown
from ....anystory_core.injection.prepare import PreparedSubjects, prepare_subjects
from ....anystory_core.injection.rows import Rows
from ....anystory_core.routing.grids import Crop
from ....anystory_core.routing.modes import build_source, source_of_run
from ....anystory_core.routing.record import RoutingRecord
from ....anystory_core.subject.grounding import ground_subjects
from ..base import Entry, RunRequest
from ..conds import Evaluation, Roles, rows_of, window_rows
from ..ids import ALONE_KEY, CALL_KEY, EVALUATION_KEY, RUN_KEY
from ..managed import load, release
from ..texts import route_texts
from ..windows import Window
from .patcher import (
    BlockTable,
    HostAttention,
    Replacements,
    installed,
    replaced_since,
    replacements,
)


@dataclass
class UNetPasses:
    """The passes of a U-Net in one sampling run: the inner wrappers, and what they share."""

    prepared: PreparedSubjects
    windows: tuple[Window, ...]
    record: RoutingRecord
    roles: Roles
    precision: Any  # of attention, where the user forces one
    table: BlockTable
    replaced: Replacements  # what stood in the blocks' slots when the run began
    batch: Tensor | None = None  # (B,C,h,w) that this evaluation of the model is about
    seen: set[int] = field(default_factory=set[int])  # its rows that were recorded

    def __deepcopy__(self, memo: dict[int, Any]) -> UNetPasses:
        return self  # in the options, which other packs copy

    # The wrappers, outermost first.

    def predict_noise(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the guided model; each row is recorded from its first call."""
        self.batch, self.seen = args[0] if args else kwargs["x"], set()
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
        rows = window_rows(options, x)
        if not rows:
            rows = range(x.shape[0]) if self.batch is None else rows_of(x, self.batch, self.seen)
        options[EVALUATION_KEY] = Evaluation.of(self.roles, conds, x, timestep, rows)
        if options.get(RUN_KEY) is self:
            options[ALONE_KEY] = replaced_since(self.replaced, options)
        return executor(
            model, conds, x, timestep, {**model_options, "transformer_options": options}
        )

    def diffusion_model(
        self, executor: WrapperExecutor, entry: Entry, *args: Any, **kwargs: Any
    ) -> Any:
        """Puts a fresh :class:`Call` and the patches that ask it into the options of this pass."""
        position = 5  # x, timesteps, context, y, control, transformer_options
        values = list(args)
        options = values[position] if len(values) > position else kwargs["transformer_options"]
        options = self._with_call(options, values[0], values[2], entry, executor.class_obj)
        if len(values) > position:
            values[position] = options
        else:
            kwargs["transformer_options"] = options
        return executor(*values, **kwargs)

    @torch.compiler.disable
    def _with_call(
        self, options: dict[str, Any], x: Tensor, context: Tensor, entry: Entry, unet: Any
    ) -> dict[str, Any]:
        """``options`` for a pass of ``unet``; themselves where nothing acts."""
        call = self._begin(options, x, entry)
        if call is None:
            return options
        # Where another pack gives text states of more rows than x has (NAG), attn2 is its own.
        late = context.shape[0] != x.shape[0]
        return {**installed(options, self.table, unet, late=late), CALL_KEY: call}

    def _begin(self, options: dict[str, Any], x: Tensor, entry: Entry) -> Call | None:
        sigma = float(options["sigmas"][0])
        factors = tuple(window.factor(sigma) for window in self.windows)
        active = tuple(factor > 0 for factor in factors)
        if self.prepared.is_idle(factors):
            self.record.call(sigma, active)
            return None
        chunks: list[int] = options["cond_or_uncond"]
        uuids: list[Any] = options.get("uuids", [None] * len(chunks))
        evaluation: Evaluation = options.get(
            EVALUATION_KEY,
            Evaluation(
                recorded=(0, self.roles.first_positive), rows=tuple(range(self.record.rows))
            ),
        )
        size, times = evaluation.layout(len(chunks), x)
        cond: list[int] = []
        uncond: list[int] = []
        crops: list[Crop | None] = [None] * x.shape[0]
        apart: list[int] = []
        recorded: dict[int, int] = {}  # row of the batch -> row of this call
        routed: list[tuple[int, Any, Crop | None]] = []
        for place, (index, uuid) in enumerate(zip(chunks, uuids, strict=True)):
            firsts = range(place * size, times * size * len(chunks), size * len(chunks))
            rows = [row for first in firsts for row in range(first, first + size)]
            (cond if evaluation.is_cond(index) else uncond).extend(rows)
            crop = evaluation.crop(uuid, x)
            if evaluation.is_cond(index) or self.prepared.keep_references_in_uncond:
                routed.append((index, uuid, crop))
            for row, view in zip(rows, self._views(evaluation, crop, size, x) * times, strict=True):
                crops[row] = view
            if crop is not None or uuid in evaluation.masked:
                apart.extend(rows)
            if uuid is not None and (index, uuid) == evaluation.recorded:
                if evaluation.is_tile(crop, x):
                    self.record.tiled = True  # its routes are not the picture's
                elif len(evaluation.rows) == size:
                    shown = zip(evaluation.rows, rows[:size], strict=True)
                    passed = self.seen - entry.recorded
                    recorded = {row: place for row, place in shown if row not in passed}
        recording = None
        if recorded:
            entry.recorded.update(recorded)
            if self.batch is not None:
                self.seen.update(recorded)
            recorder = self.record.call(sigma, active, tuple(recorded))
            recording = Recording(recorder, tuple(recorded.values()))
        if entry.passes == 0:
            entry.kind = evaluation.kind(routed, size * times, x)
        entry.passes += 1
        return Call(
            self.prepared,
            Rows(tuple(cond), tuple(uncond)),
            factors,
            self.record.sites,
            HostAttention(options, self.precision),
            Shown(
                crops=tuple(crops) if any(crops) else (),
                apart=tuple(apart),
                kind=entry.kind,
                again=entry.passes > 1,
            ),
            recording,
        )

    def _views(
        self, evaluation: Evaluation, crop: Crop | None, size: int, x: Tensor
    ) -> list[Crop | None]:
        """What each of the ``size`` rows of a cond shows. RoutingError where every picture has
        masks of its own and nobody knows which ones these are."""
        if self.prepared.source.pictures == 1:
            return [crop] * size
        numbers = evaluation.rows
        if len(numbers) != size:
            raise RoutingError(
                f"masks: each picture of the batch has its own, but another node draws {size} of "
                f"{self.record.rows} pictures at once and does not say which; give each subject "
                "one mask for all"
            )
        return [evaluation.view(crop, number, x) for number in numbers]


def prepare_passes(request: RunRequest) -> UNetPasses:
    """Project the subjects for a run, unless an earlier one has."""
    routing, guider, kept = request.routing, request.guider, request.kept
    model = guider.model_patcher
    if kept is not None and kept.prepared is not None:
        earlier = kept.prepared
        source = source_of_run(earlier.source, routing.mode, routing.masks)
        prepared = replace(earlier, source=source)
        request.advance(2)
    else:
        prepared = _project(request)
        if kept is not None:
            kept.prepared = prepared
    return UNetPasses(
        prepared,
        request.windows,
        request.record,
        Roles.of(guider),
        _attention_precision(model.model.diffusion_model),
        BlockTable(request.record.sites),
        replacements(guider.model_options["transformer_options"]),
    )


def _project(request: RunRequest) -> PreparedSubjects:
    routing, guider, advance = request.routing, request.guider, request.advance
    anystory, subjects = routing.anystory, routing.subjects
    model = guider.model_patcher
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    device = model.load_device
    texts = None
    if routing.mode.startswith("text"):
        texts = route_texts(routing.labels, guider, device)
    # Only tokens that know their places are made here: the others were made with the subject.
    grounded = any(subject.states is not None for subject in subjects)
    used = anystory.having("projections", *(("encoder",) if grounded else ()))
    load([*used, *routing.routers()])
    advance(1)
    try:
        moved = [s.map(lambda x: x.to(device, dtype)) for s in subjects]
        moved = ground_subjects(anystory.model, routing.mode, moved, routing.masks)
        source = build_source(routing.mode, anystory.model, moved, routing.masks, texts)
        agree = routing.agree and routing.mode == "learned"
        prepared = prepare_subjects(anystory.model, moved, source, request.settings, agree=agree)
    finally:
        release(used)
    advance(1)
    return prepared


def _attention_precision(unet: Any) -> Any:
    """The U-Net's own attention precision (None unless the user forces upcasting)."""
    for module in unet.modules():
        if hasattr(module, "attn_precision"):
            return module.attn_precision
    return None
