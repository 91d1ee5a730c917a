"""Configuration -> modules: the composition root of AnyStory on FLUX.

A file may hold any of the parts in :data:`PARTS`; those of the router are not needed for one
subject, or where masks say who is where.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from .config import FluxConfig
from .low_rank import RoutingMaps, StreamBranches
from .redux import ReduxEmbedder
from .sites import FluxSite, build_sites

# Part -> prefix of its keys in a weights file.
PARTS = {
    "subject_redux": "redux.subject.",
    "routing_redux": "redux.routing.",
    "reference_branches": "branches.reference.",
    "router_branches": "branches.router.",
    "routing_maps": "branches.maps.",
}


@dataclass
class FluxModel:
    """The modules of one weights file. ``fingerprint`` names its tensors; "" when never saved."""

    config: FluxConfig
    sites: tuple[FluxSite, ...]
    subject_redux: ReduxEmbedder | None
    routing_redux: ReduxEmbedder | None
    reference_branches: StreamBranches | None
    router_branches: StreamBranches | None
    routing_maps: RoutingMaps | None
    fingerprint: str = ""

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(prefix without the dot, module) of all that is there."""
        there = {
            "subject_redux": self.subject_redux,
            "routing_redux": self.routing_redux,
            "reference_branches": self.reference_branches,
            "router_branches": self.router_branches,
            "routing_maps": self.routing_maps,
        }
        for part, prefix in PARTS.items():
            module = there[part]
            if module is not None:
                yield prefix.removesuffix("."), module

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors under their names in a weights file."""
        return {
            f"{prefix}.{key}": tensor
            for prefix, module in self.modules()
            for key, tensor in module.state_dict().items()
        }

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that are there, in the order of :data:`PARTS`."""
        prefixes = {f"{prefix}." for prefix, _ in self.modules()}
        return tuple(part for part, prefix in PARTS.items() if prefix in prefixes)

    @property
    def routes(self) -> bool:
        """Whether the file can say by itself who is where."""
        return None not in (self.routing_redux, self.router_branches, self.routing_maps)


def build_model(
    config: FluxConfig,
    parts: Collection[str] = tuple(PARTS),
    *,
    operations: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> FluxModel:
    """Build the named parts with fresh weights. Unknown part names are a ConfigError."""
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ConfigError(f"parts: unknown {unknown}, expected among {list(PARTS)}")
    kw: dict[str, Any] = {"operations": operations, "dtype": dtype, "device": device}
    redux = config.redux

    def embedder(part: str, grid: int) -> ReduxEmbedder | None:
        return ReduxEmbedder(config, grid=grid, **kw) if part in parts else None

    return FluxModel(
        config=config,
        sites=build_sites(config.transformer),
        subject_redux=embedder("subject_redux", redux.subject_grid),
        routing_redux=embedder("routing_redux", redux.routing_grid),
        reference_branches=StreamBranches.reference(config, **kw)
        if "reference_branches" in parts
        else None,
        router_branches=StreamBranches.router(config, **kw) if "router_branches" in parts else None,
        routing_maps=RoutingMaps(config, **kw) if "routing_maps" in parts else None,
    )
