"""Masks as routes where every row of a batch has its own: batches of different pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..routes import Crops, Grid, MaskRoutes, SoftMaps
from ..sites import Site


@dataclass(frozen=True)
class RowMasks:
    """One :class:`~anystory_core.routes.MaskRoutes` per row, of as many subjects each."""

    rows: tuple[MaskRoutes, ...]

    @classmethod
    def of(cls, masks: Iterable[Tensor]) -> RowMasks:
        """From the masks (N,H,W) in [0,1] of each row."""
        return cls(tuple(MaskRoutes(tuple(row)) for row in masks))

    @property
    def candidates(self) -> int:
        return self.rows[0].candidates

    def maps(self, site: Site, z: Tensor, grid: Grid, crops: Crops) -> SoftMaps:
        return _joined([row.maps(site, z[:1], grid, ()) for row in self.rows])

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        first = SoftMaps(soft.maps[:1], soft.grid)
        return _joined([row.resize(first, grid, ()) for row in self.rows])


def _joined(parts: Sequence[SoftMaps]) -> SoftMaps:
    return SoftMaps(torch.cat([p.maps for p in parts]), parts[0].grid)
