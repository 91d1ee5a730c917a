"""One sampling run inside the host.

``SamplingWrapper`` is an OUTER_SAMPLE wrapper. It runs before the host loads the model: it prepares
the subjects, lets the model's :class:`~.handover.Handover` lead every call to them, and takes
everything away in ``finally``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.utils
from torch import Tensor

from ...anystory_core.injection.prepare import Settings
from ...anystory_core.routing.masks import check_batch
from ...anystory_core.routing.record import RoutingRecord
from .base import HostBase, Kept, Passes, RunRequest
from .handover import Handover
from .ids import named
from .sockets import Routing, RoutingMaps
from .windows import Window


@dataclass(frozen=True)
class SamplingWrapper:
    """OUTER_SAMPLE wrapper; immutable, so clones of the model may share it."""

    base: HostBase
    routing: Routing
    settings: Settings
    start: float
    end: float
    maps: RoutingMaps
    handover: Handover
    node: str | None = None  # whose settings these are, when it is not the node that samples
    bar: bool = True  # the preparations move the progress bar of the node that samples
    kept: Kept | None = None  # shared with other runs of the same subjects

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
            record = RoutingRecord(labels, (), rows=latent.shape[0], idle=True)
            self.maps.file([latent], record)
            return latent
        told = contextlib.nullcontext if self.node is None else partial(named, self.node)
        with told():
            if self.routing.mode.endswith("masks"):
                check_batch(self.routing.masks, noise.shape[0])
            passes = self._prepare(guider, windows, sigmas, noise.shape[0])

        denoised: list[Tensor] = []

        def reported(step: int, x0: Tensor | None, *rest: Any) -> Any:
            passes.record.sampled(step)
            denoised[:] = [x0] if isinstance(x0, Tensor) else []
            return None if callback is None else callback(step, x0, *rest)

        with told(), self.handover.to(passes, guider.model_options):
            latent = executor(
                noise, latent_image, sampler, sigmas, denoise_mask, reported, *args, **kwargs
            )
        passes.record.finish()
        # As the host's samplers with two results give the denoised one, to the bit.
        out = guider.model_patcher.model.process_latent_out
        last = [out(x0.cpu()) for x0 in denoised if x0.shape == latent.shape]
        self.maps.file([latent, *last], passes.record)
        return latent

    def _windows(self, model: Any) -> tuple[Window, ...]:
        """Percents become noise levels: own window and overall window together."""
        sampling = model.get_model_object("model_sampling")
        return tuple(
            Window.of(subject.options, self.start, self.end, sampling)
            for subject in self.routing.subjects
        )

    def _idle(self, windows: Sequence[Window]) -> bool:
        """All strengths 0 or all windows empty: the model must run as if we were not there."""
        settings = self.settings
        return not any(
            window.start > window.end
            and max(subject.options.at_start, subject.options.at_end) > 0
            and (
                settings.strength * subject.options.strength > 0
                or settings.reference_strength * subject.options.reference_strength > 0
            )
            for subject, window in zip(self.routing.subjects, windows, strict=True)
        )

    def _prepare(
        self, guider: Any, windows: tuple[Window, ...], sigmas: Tensor, rows: int
    ) -> Passes:
        advance = self._progress(sigmas.shape[-1] - 1)
        record = RoutingRecord(
            tuple(subject.label for subject in self.routing.subjects),
            self.routing.anystory.model.sites,
            tuple(sigmas.tolist()),
            rows,
            keep_soft=self.maps.keep_soft,
        )
        return self.base.prepare(
            RunRequest(
                guider,
                self.routing,
                self.settings,
                windows,
                record,
                advance,
                self.kept,
            )
        )

    def _progress(self, steps: int) -> Callable[[int], None]:
        """Advances a bar by one of the two parts of the preparations. Together they are half of the
        first of ``steps``, so that the sampler's own bar goes on from there."""
        if not self.bar:
            return lambda _: None
        return comfy.utils.ProgressBar(4 * max(1, steps)).update
