"""Routes of a batch whose rows are different pictures: each row, or run of rows, has its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anystory_core.bases.base import Site
from anystory_core.routing.grids import Crops, Grid, SoftMaps, area_mean
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


@dataclass
class OwnPlaces:
    """Rows of a batch that have one subject each: row b's is candidate b, and goes where ``places``
    (B,H,W) in [0,1] is at least a half."""

    places: Tensor
    _maps: dict[Grid, Tensor] = field(default_factory=dict[Grid, Tensor], repr=False)

    @property
    def candidates(self) -> int:
        """B + 1."""
        return len(self.places) + 1

    @property
    def pictures(self) -> int:
        """As of a source that is the same for all pictures."""
        return 1

    def maps(self, site: Site, z: Tensor, grid: Grid, crops: Crops) -> SoftMaps:
        """The same at every block."""
        return self._on(grid)

    def _on(self, grid: Grid) -> SoftMaps:
        if grid not in self._maps:
            share = area_mean(self.places, grid).flatten(1)
            rows = range(len(share))
            maps = share.new_zeros(len(share), self.candidates, share.shape[1])
            maps[rows, rows] = (share >= 0.5).to(share)
            maps[:, -1] = (share < 0.5).to(share)
            self._maps[grid] = maps
        return SoftMaps(self._maps[grid], grid)

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        """The places themselves on that grid."""
        return self._on(grid)


def _joined(parts: Sequence[SoftMaps]) -> SoftMaps:
    return SoftMaps(torch.cat([p.maps for p in parts]), parts[0].grid)
