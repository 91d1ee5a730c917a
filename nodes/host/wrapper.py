"""One sampling run inside the host: ApplyAnyStory's only trace on a model is this wrapper.

``SamplingWrapper`` is an OUTER_SAMPLE wrapper. It runs before the host loads the U-Net: it projects
keys and values, puts this run's patches and inner wrappers into the guider's own copy of
``model_options``, and takes everything away in ``finally``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...anystory_core.injection.call import Call, Rows
from ...anystory_core.injection.run import Run, Settings, build_source, prepare_run
from ...anystory_core.routing.record import RoutingRecord
from ...anystory_core.routing.sources import Crop
from ...anystory_core.subject.subject import Subject
from .conds import Evaluation, Roles
from .ids import CALL_KEY, EVALUATION_KEY, WRAPPER_KEY, named
from .managed import ManagedAnyStory, load, release
from .sdxl import patcher
from .sdxl.checks import check_latent_format, check_model
from .sockets import RoutingMaps
from .texts import route_texts


@dataclass(frozen=True)
class Routing:
    """The ANYSTORY_ROUTING socket: who, and where by which rule."""

    anystory: ManagedAnyStory
    subjects: tuple[Subject, ...]
    masks: tuple[Tensor | None, ...]
    mode: str
    labels: tuple[Tensor, ...] = ()  # text states of the labels, for the modes with text
    agree: bool = False  # in the mode "learned": the blocks decide together who is where

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
        """Both ends count; an empty window holds nothing, also where a step falls on it."""
        return self.end < self.start and self.end <= sigma <= self.start


@dataclass
class RunState:
    """What the inner wrappers of one run share."""

    run: Run
    windows: tuple[Window, ...]
    record: RoutingRecord
    roles: Roles
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
        if self.run.is_idle(active):
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
            if evaluation.is_cond(index) or self.run.keep_references_in_uncond:
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
            self.run,
            Rows(tuple(cond), tuple(uncond)),
            active,
            self.record.sites,
            patcher.HostAttention(options, self.precision),
            crops=tuple(crops) if any(crops) else (),
            recorder=self.record if record else None,
            record=record,
            apart=tuple(apart),
            kind=evaluation.kind(routed, size * times, x),
        )


@dataclass(frozen=True)
class SamplingWrapper:
    """OUTER_SAMPLE wrapper; immutable, so clones of the model may share it."""

    routing: Routing
    settings: Settings
    start: float
    end: float
    maps: RoutingMaps
    node: str | None = None  # whose settings these are, when it is not the node that samples
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
            latent = executor(
                noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs
            )
            labels = tuple(subject.label for subject in self.routing.subjects)
            self.maps.file(latent, RoutingRecord(labels, (), idle=True))
            return latent
        with contextlib.nullcontext() if self.node is None else named(self.node):
            state = self._prepare(guider, windows, sigmas.shape[-1] - 1)
        options = guider.model_options
        before = options["transformer_options"]

        def reported(*step: Any) -> Any:
            state.record.commit_step()
            return None if callback is None else callback(*step)

        try:
            options["transformer_options"] = self._patched(
                before, state, guider.model_patcher.model
            )
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
        roles = Roles.of(guider)
        texts = None
        if self.routing.mode.startswith("text"):
            texts = route_texts(self.routing.labels, model, device)
        advance = self._progress(steps)
        load([*anystory.having("projections"), *self.routing.routers()])
        advance(1)
        try:
            moved = [s.map(lambda x: x.to(device, dtype)) for s in subjects]
            source = build_source(
                self.routing.mode, anystory.model, moved, self.routing.masks, texts
            )
            agree = self.routing.agree and self.routing.mode == "learned"
            run = prepare_run(anystory.model, moved, source, self.settings, agree=agree)
        finally:
            release(anystory.having("projections"))
        advance(1)
        names = [s.label for s in subjects]
        return RunState(
            run,
            windows,
            RoutingRecord(tuple(names), anystory.model.sites, self.maps.keep_soft),
            roles,
            _attention_precision(model),
        )

    def _progress(self, steps: int) -> Callable[[int], None]:
        """Advances a bar by one of the two parts of the preparations. Together they are half of the
        first of ``steps``, so that the sampler's own bar goes on from there."""
        if not self.bar:
            return lambda _: None
        return comfy.utils.ProgressBar(4 * max(1, steps)).update

    def _patched(self, before: dict[str, Any], state: RunState, model: Any) -> dict[str, Any]:
        """A copy of the guider's transformer options with this run's patches and wrappers."""
        options = comfy.patcher_extension.copy_nested_dicts(before)
        patcher.install(options, state.record.sites, model.diffusion_model)
        for kind, wrapper in (
            (WrappersMP.PREDICT_NOISE, state.predict_noise),
            (WrappersMP.CALC_COND_BATCH, state.calc_cond_batch),
            (WrappersMP.DIFFUSION_MODEL, state.diffusion_model),
        ):
            comfy.patcher_extension.add_wrapper_with_key(kind, WRAPPER_KEY, wrapper, options)
        return options


def _attention_precision(model: Any) -> Any:
    """The U-Net's own attention precision (None unless the user forces upcasting)."""
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "attn_precision"):
            return module.attn_precision
    return None
