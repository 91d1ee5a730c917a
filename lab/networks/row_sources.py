"""Routes of a batch whose rows are different pictures: each row, or run of rows, has its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anystory_core.bases.base import Site
from anystory_core.routing.grids import Crops, Grid, SoftMaps
from anystory_core.routing.sources import MaskRoutes, RouteSource


@dataclass(frozen=True)
class RowSources:
    """Sources of as many candidates each, and how many rows, one after the other, are theirs."""

    parts: tuple[tuple[int, RouteSource], ...]

    @classmethod
    def of_masks(cls, masks: Iterable[Tensor]) -> RowSources:
        """One row for each of ``masks`` (N,H,W) in [0,1]."""
        return cls(tuple((1, MaskRoutes(tuple(row))) for row in masks))

    @property
    def candidates(self) -> int:
        return self.parts[0][1].candidates

    def maps(self, site: Site, z: Tensor, grid: Grid, crops: Crops) -> SoftMaps:
        pieces = z.split([rows for rows, _ in self.parts])
        found = zip(self.parts, pieces, strict=True)
        return _joined([source.maps(site, piece, grid, ()) for (_, source), piece in found])

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        pieces = soft.maps.split([rows for rows, _ in self.parts])
        return _joined(
            [
                source.resize(SoftMaps(piece, soft.grid), grid, ())
                for (_, source), piece in zip(self.parts, pieces, strict=True)
            ]
        )


def _joined(parts: Sequence[SoftMaps]) -> SoftMaps:
    return SoftMaps(torch.cat([p.maps for p in parts]), parts[0].grid)
