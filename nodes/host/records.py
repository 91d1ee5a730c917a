"""Recorded runs, found again by the latent that they returned."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...anystory_core.errors import RoutingError
from ...anystory_core.routing_maps import RoutingRecord
from .tensors import fingerprint

KEPT_RUNS = 4


@dataclass
class RoutingMaps:
    """The ANYSTORY_MAPS socket: the last runs of one ApplyAnyStory."""

    keep_soft: bool = False
    unrouted: bool = False  # the router has no subject: sampling is the host's own
    runs: dict[str, RoutingRecord] = field(default_factory=dict)

    def file(self, latent: Tensor, record: RoutingRecord) -> None:
        """Keep a finished run under the latent that it returned; the oldest gives way."""
        key = fingerprint(latent)
        self.runs.pop(key, None)
        self.runs[key] = record
        while len(self.runs) > KEPT_RUNS:
            del self.runs[next(iter(self.runs))]

    def find(self, latent: Tensor) -> RoutingRecord:
        """The run that returned ``latent``."""
        if self.unrouted:
            return RoutingRecord((), (), idle=True)
        record = self.runs.get(fingerprint(latent))
        if record is None:
            raise RoutingError(
                "latent: no recorded run returned this latent. Connect the LATENT of the sampler "
                "that uses this ApplyAnyStory's model; if it is connected, the sampler's result "
                "came from the cache, which no longer has its routes: change the seed, or clear "
                "the host's execution cache and queue again"
            )
        return record
