"""One sampling run inside the host.

``SamplingWrapper`` is an OUTER_SAMPLE wrapper. It runs before the host loads the model: it prepares
the subjects, lets the model's :class:`~.handover.Handover` lead every call to them, and takes
everything away in ``finally``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.utils
from torch import Tensor

from ...anystory_core.injection.prepare import Settings
from ...anystory_core.routing.record import RoutingRecord
from .base import HostBase, Kept, Passes, RunRequest
from .handover import Handover
from .ids import named
from .sockets import Routing, RoutingMaps


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
        told = contextlib.nullcontext if self.node is None else partial(named, self.node)
        with told():
            passes = self._prepare(guider, sigmas, noise.shape[0])
        if passes is None:
            latent = executor(
                noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs
            )
            record = RoutingRecord(self._labels, (), rows=latent.shape[0], idle=True)
            self.maps.file([latent], record)
            return latent

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

    @property
    def _labels(self) -> tuple[str, ...]:
        return tuple(subject.label for subject in self.routing.subjects)

    def _prepare(self, guider: Any, sigmas: Tensor, rows: int) -> Passes | None:
        record = RoutingRecord(
            self._labels,
            self.routing.anystory.model.sites,
            tuple(sigmas.tolist()),
            rows,
            keep_soft=self.maps.keep_soft,
        )
        return self.base.prepare(
            RunRequest(
                guider=guider,
                routing=self.routing,
                settings=self.settings,
                start=self.start,
                end=self.end,
                sigmas=sigmas,
                record=record,
                advance=self._progress(sigmas.shape[-1] - 1),
                kept=self.kept,
            )
        )

    def _progress(self, steps: int) -> Callable[[int], None]:
        """Advances a bar by one of the two parts of the preparations. Together they are half of the
        first of ``steps``, so that the sampler's own bar goes on from there."""
        if not self.bar:
            return lambda _: None
        return comfy.utils.ProgressBar(4 * max(1, steps)).update
