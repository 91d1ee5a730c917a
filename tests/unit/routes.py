"""Made-up routing records for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anystory_core.bases.base import Site
from anystory_core.bases.flux import sites as flux
from anystory_core.bases.flux.config import FluxConfig
from anystory_core.bases.sdxl import sites as sdxl
from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.routing.record import LevelRecord, RoutingRecord

Regions = Callable[[Tensor, Tensor], Tensor]  # y, x in [0,1) of each token -> region ids


def sites_of(config: AnyStoryConfig | FluxConfig) -> tuple[Site, ...]:
    if isinstance(config, FluxConfig):
        return flux.build_sites(config.transformer)
    return sdxl.build_sites(config.unet)


def halves(subjects: int) -> Regions:
    """Vertical stripes, one per subject, from left to right; no background."""
    return lambda y, x: (x * subjects).long()


def record_of(
    config: AnyStoryConfig | FluxConfig,
    regions: Regions,
    *,
    labels: tuple[str, ...] = ("fox", "owl"),
    steps: int,
    size: tuple[int, int] = (256, 256),
) -> RoutingRecord:
    """The same regions at every block and step of a picture of ``size``, one batch row."""
    sites = sites_of(config)
    schedule = (*(14.6 / (number + 1) for number in range(steps)), 0.0)
    record = RoutingRecord(labels, sites, schedule)
    for number in range(steps):
        level = LevelRecord(schedule[number], tuple(True for _ in labels), number)
        for site in sites:
            h, w = (-(-n // (8 * site.stride)) for n in size)
            y = (torch.arange(h)[:, None].expand(h, w) + 0.5) / h
            x = (torch.arange(w)[None].expand(h, w) + 0.5) / w
            level.ids[site.index] = regions(y, x).flatten()[None].to(torch.uint8)
            level.grids[site.index] = (h, w)
        record.levels.append(level)
    return record


def random_record(
    config: AnyStoryConfig | FluxConfig,
    labels: tuple[str, ...],
    *,
    steps: int,
    size: tuple[int, int],
    seed: int,
) -> RoutingRecord:
    """Every token by chance: the worst case for compression."""
    generator = torch.Generator().manual_seed(seed)

    def chance(y: Tensor, x: Tensor) -> Tensor:
        return torch.randint(len(labels) + 1, y.shape, generator=generator)

    return record_of(config, chance, labels=labels, steps=steps, size=size)
