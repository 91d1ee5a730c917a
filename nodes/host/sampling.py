"""One sampling run inside the host: ApplyAnyStory's only trace on a model is this wrapper.

``SamplingWrapper`` is an OUTER_SAMPLE wrapper. It runs before the host loads the U-Net: it projects
keys and values, puts this run's patches and inner wrappers into the guider's own copy of
``model_options``, and takes everything away in ``finally``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...anystory_core.conditioner import Call, Rows
from ...anystory_core.routes import Crop
from ...anystory_core.routing_maps import RoutingRecord
from ...anystory_core.run import Run, Settings, build_source, prepare_run
from ...anystory_core.subject import Subject
from . import patcher
from .checks import check_latent_format, check_model
from .ids import CALL_KEY, CROPS_KEY, ROLES_KEY, WRAPPER_KEY
from .managed import ManagedAnyStory, load, release
from .records import RoutingMaps
from .texts import empty_tokens, route_texts


@dataclass(frozen=True)
class Routing:
    """The ANYSTORY_ROUTING socket: who, and where by which rule."""

    anystory: ManagedAnyStory
    subjects: tuple[Subject, ...]
    masks: tuple[Tensor | None, ...]
    mode: str
    labels: tuple[Tensor, ...] = ()  # text states of the labels, for the modes with text

    def get_models(self) -> list[Any]:
        """What the host may count and free with this output."""
        return self.anystory.get_models()

    def routers(self) -> list[Any]:
        """The patchers of the routers, in the modes that ask them."""
        return self.anystory.having("routers") if self.mode.startswith("learned") else []


@dataclass(frozen=True)
class Window:
    """Noise levels between which one subject acts."""

    start: float
    end: float

    def holds(self, sigma: float) -> bool:
        return self.end <= sigma <= self.start


@dataclass(frozen=True)
class Areas:
    """Where on the latent each cond of one evaluation acts (area conditioning)."""

    size: tuple[int, int]
    of_cond: dict[Any, list[tuple[int, ...]]]  # uuid -> (height, width, y, x) in latent pixels

    @classmethod
    def of(cls, conds: Sequence[Sequence[dict[str, Any]] | None], x: Tensor) -> Areas | None:
        """None when no cond has an area."""
        found: dict[Any, list[tuple[int, ...]]] = {}
        for entry in (entry for entries in conds for entry in entries or ()):
            if "area" in entry:
                found.setdefault(entry.get("uuid"), []).append(tuple(entry["area"]))
        return cls((x.shape[-2], x.shape[-1]), found) if found else None

    def crop(self, uuid: Any, x: Tensor) -> Crop | None:
        """The part that a call with latent ``x`` shows; the host cuts areas at the border."""
        for height, width, top, left in self.of_cond.get(uuid, ()):
            part = min(height, self.size[0] - top), min(width, self.size[1] - left)
            if part == (x.shape[-2], x.shape[-1]):
                return Crop(top, left, *part, *self.size)
        return None


@dataclass
class RunState:
    """What the inner wrappers of one run share."""

    run: Run
    windows: tuple[Window, ...]
    record: RoutingRecord
    roles: dict[Any, str]  # cond uuid -> "cond" or "uncond"
    first_positive: Any  # uuid of the positive cond whose rows are recorded
    precision: Any
    fresh: bool = True  # the next call is the first of a model evaluation

    def active(self, sigma: float) -> tuple[bool, ...]:
        return tuple(window.holds(sigma) for window in self.windows)

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
        roles = tuple(self._role(i, entries) for i, entries in enumerate(conds))
        options = dict(model_options.get("transformer_options", {}))
        options[ROLES_KEY] = roles
        options[CROPS_KEY] = Areas.of(conds, x)
        return executor(
            model, conds, x, timestep, {**model_options, "transformer_options": options}
        )

    def _role(self, index: int, entries: Sequence[dict[str, Any]] | None) -> str:
        for entry in entries or ():
            role = self.roles.get(entry.get("uuid"))
            if role is not None:
                return role
        return "cond" if index == 0 else "uncond"

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
        if self.run.is_idle(active):
            self.record.begin_step(sigma, active)
            return None
        chunks: list[int] = options["cond_or_uncond"]
        uuids: list[Any] = options.get("uuids", [None] * len(chunks))
        roles: tuple[str, ...] = options.get(ROLES_KEY, ())
        areas: Areas | None = options.get(CROPS_KEY)
        size = x.shape[0] // len(chunks)
        cond: list[int] = []
        uncond: list[int] = []
        crops: list[Crop | None] = []
        record: tuple[int, ...] = ()
        for place, (index, uuid) in enumerate(zip(chunks, uuids, strict=True)):
            rows = range(place * size, (place + 1) * size)
            role = roles[index] if index < len(roles) else ("uncond" if index else "cond")
            (cond if role == "cond" else uncond).extend(rows)
            crops += [areas.crop(uuid, x) if areas else None] * size
            if uuid == self.first_positive and self.fresh:
                record = tuple(rows)
        if record:
            self.fresh = False
            self.record.begin_step(sigma, active)
        return Call(
            self.run,
            Rows(tuple(cond), tuple(uncond)),
            active,
            self.record.sites,
            patcher.HostAttention(options, self.precision),
            crops=tuple(crops) if any(crops) else (),
            recorder=self.record if record else None,
            record=record,
        )


@dataclass(frozen=True)
class SamplingWrapper:
    """OUTER_SAMPLE wrapper; immutable, so clones of the model may share it."""

    routing: Routing
    settings: Settings
    start: float
    end: float
    maps: RoutingMaps
    bar: bool = True  # the preparations move the progress bar of the node that samples

    def __deepcopy__(self, memo: dict[int, Any]) -> SamplingWrapper:
        return self

    def __call__(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        guider = executor.class_obj
        windows = self._windows(guider.model_patcher)
        if self._idle(windows):
            return executor(
                noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs
            )
        state = self._prepare(guider, windows, sigmas.shape[-1] - 1)
        options = guider.model_options
        before = options["transformer_options"]

        def reported(*step: Any) -> Any:
            state.record.commit_step()
            return None if callback is None else callback(*step)

        try:
            options["transformer_options"] = self._patched(before, state)
            latent = executor(
                noise, latent_image, sampler, sigmas, denoise_mask, reported, *args, **kwargs
            )
        finally:
            options["transformer_options"] = before
        state.record.finish()
        self.maps.file(latent, state.record)
        return latent

    def _windows(self, model: Any) -> tuple[Window, ...]:
        """Percents become noise levels: own window and overall window together."""
        to_sigma = model.get_model_object("model_sampling").percent_to_sigma
        return tuple(
            Window(
                float(to_sigma(max(self.start, subject.options.start))),
                float(to_sigma(min(self.end, subject.options.end))),
            )
            for subject in self.routing.subjects
        )

    def _idle(self, windows: Sequence[Window]) -> bool:
        """All strengths 0 or all windows empty: the model must run as if we were not there."""
        settings = self.settings
        return not any(
            window.start > window.end
            and (
                settings.strength * subject.options.strength > 0
                or settings.reference_strength * subject.options.reference_strength > 0
            )
            for subject, window in zip(self.routing.subjects, windows, strict=True)
        )

    def _prepare(self, guider: Any, windows: tuple[Window, ...], steps: int) -> RunState:
        anystory, subjects = self.routing.anystory, self.routing.subjects
        model = guider.model_patcher
        check_model(model, anystory.model.config, anystory.model.sites)
        check_latent_format(model, anystory.model.config)
        dtype = model.model.manual_cast_dtype or model.model.get_dtype()
        device = model.load_device
        roles, first = _read_conds(guider)
        texts = None
        if self.routing.mode.startswith("text"):
            texts = route_texts(self.routing.labels, empty_tokens(guider, roles), model, device)
        advance = self._progress(steps)
        load([*anystory.having("projections"), *self.routing.routers()])
        advance(1)
        try:
            moved = [s.map(lambda x: x.to(device, dtype)) for s in subjects]
            source = build_source(
                self.routing.mode, anystory.model, moved, self.routing.masks, texts
            )
            run = prepare_run(anystory.model, moved, source, self.settings)
        finally:
            release(anystory.having("projections"))
        advance(1)
        names = [s.label for s in subjects]
        return RunState(
            run,
            windows,
            RoutingRecord(tuple(names), anystory.model.sites, self.maps.keep_soft),
            roles,
            first,
            _attention_precision(model),
        )

    def _progress(self, steps: int) -> Callable[[int], None]:
        """Advances a bar by one of the two parts of the preparations. Together they are half of the
        first of ``steps``, so that the sampler's own bar goes on from there."""
        if not self.bar:
            return lambda _: None
        return comfy.utils.ProgressBar(4 * max(1, steps)).update

    def _patched(self, before: dict[str, Any], state: RunState) -> dict[str, Any]:
        """A copy of the guider's transformer options with this run's patches and wrappers."""
        options = comfy.patcher_extension.copy_nested_dicts(before)
        patcher.install(options, state.record.sites)
        for kind, wrapper in (
            (WrappersMP.PREDICT_NOISE, state.predict_noise),
            (WrappersMP.CALC_COND_BATCH, state.calc_cond_batch),
            (WrappersMP.DIFFUSION_MODEL, state.diffusion_model),
        ):
            comfy.patcher_extension.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper, options)
        return options


def _read_conds(guider: Any) -> tuple[dict[Any, str], Any]:
    """Role of every cond by uuid, and the first positive one. A guider's lists named like
    "negative" are unconditional (PerpNeg has two of them); all others are conditional."""
    roles: dict[Any, str] = {}
    first: Any = None
    for name, entries in guider.conds.items():
        role = "uncond" if "negative" in name or "uncond" in name else "cond"
        for entry in entries:
            roles[entry["uuid"]] = role
            if first is None and role == "cond":
                first = entry["uuid"]
    return roles, first


def _attention_precision(model: Any) -> Any:
    """The U-Net's own attention precision (None unless the user forces upcasting)."""
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "attn_precision"):
            return module.attn_precision
    return None
