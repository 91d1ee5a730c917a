"""One sampling run inside the host: ApplyAnyStory's only trace on a model is this wrapper.

``SamplingWrapper`` is an OUTER_SAMPLE wrapper. It runs before the host loads the model: it prepares
the subjects, puts this run's patches and inner wrappers into the guider's own copy of
``model_options``, and takes everything away in ``finally``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.utils
from torch import Tensor

from ...anystory_core.injection.prepare import Settings
from ...anystory_core.routing.record import RoutingRecord
from .base import HostBase, Passes, RunRequest
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
        with contextlib.nullcontext() if self.node is None else named(self.node):
            passes = self._prepare(guider, sigmas)
        if passes is None:
            latent = executor(
                noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs
            )
            self.maps.file(latent, RoutingRecord(self._labels, (), idle=True))
            return latent
        options = guider.model_options
        before = options["transformer_options"]

        def reported(*step: Any) -> Any:
            passes.record.commit_step()
            return None if callback is None else callback(*step)

        try:
            options["transformer_options"] = passes.installed(before)
            latent = executor(
                noise, latent_image, sampler, sigmas, denoise_mask, reported, *args, **kwargs
            )
        finally:
            options["transformer_options"] = before
        passes.record.finish()
        self.maps.file(latent, passes.record)
        return latent

    @property
    def _labels(self) -> tuple[str, ...]:
        return tuple(subject.label for subject in self.routing.subjects)

    def _prepare(self, guider: Any, sigmas: Tensor) -> Passes | None:
        sites = self.routing.anystory.model.sites
        return self.base.prepare(
            RunRequest(
                guider=guider,
                routing=self.routing,
                settings=self.settings,
                start=self.start,
                end=self.end,
                sigmas=sigmas,
                record=RoutingRecord(self._labels, sites, self.maps.keep_soft),
                advance=self._progress(sigmas.shape[-1] - 1),
            )
        )

    def _progress(self, steps: int) -> Callable[[int], None]:
        """Advances a bar by one of the two parts of the preparations. Together they are half of the
        first of ``steps``, so that the sampler's own bar goes on from there."""
        if not self.bar:
            return lambda _: None
        return comfy.utils.ProgressBar(4 * max(1, steps)).update
