"""Routes of a batch whose rows are different pictures: each row, or run of rows, has its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anystory_core.bases.base import Site
from anystory_core.routing.grids import Crops, Grid, SoftMaps, area_mean
from anystory_core.routing.sources import RouteSource


@dataclass(frozen=True)
class RowSources:
    """Sources of as many candidates each, and how many rows, one after the other, are theirs."""

    parts: tuple[tuple[int, RouteSource], ...]

    @classmethod
    def of_masks(cls, masks: Iterable[Tensor]) -> RowSources:
        """One row for each of ``masks`` (N,H,W) in [0,1]."""
        rows = torch.stack(tuple(masks))
        return cls(((len(rows), GivenPlaces(rows)),))

    @property
    def candidates(self) -> int:
        return self.parts[0][1].candidates

    @property
    def pictures(self) -> int:
        """As of a source that is the same for all pictures."""
        return 1

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
class _Places(ABC):
    """Routes by masks, which are the same at every block: made once for each grid."""

    masks: Tensor
    _maps: dict[Grid, Tensor] = field(default_factory=dict[Grid, Tensor], repr=False)

    @property
    @abstractmethod
    def candidates(self) -> int:
        """Subjects and the background."""

    @abstractmethod
    def _made(self, shares: Tensor) -> Tensor:
        """Maps (B,C,Q) of what share of each token the masks cover, (B,...,Q)."""

    @property
    def pictures(self) -> int:
        """As of a source that is the same for all pictures."""
        return 1

    def maps(self, site: Site, z: Tensor, grid: Grid, crops: Crops) -> SoftMaps:
        """The same at every block."""
        return self._on(grid)

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        """The masks themselves on that grid."""
        return self._on(grid)

    def _on(self, grid: Grid) -> SoftMaps:
        if grid not in self._maps:
            self._maps[grid] = self._made(area_mean(self.masks, grid).flatten(-2))
        return SoftMaps(self._maps[grid], grid)


@dataclass
class GivenPlaces(_Places):
    """Rows that have equally many subjects, each its own ``masks`` (B,N,H,W) in [0,1], as
    :class:`~anystory_core.routing.sources.MaskRoutes` has them: the background is 1 - max."""

    @property
    def candidates(self) -> int:
        """N + 1."""
        return self.masks.shape[1] + 1

    def _made(self, shares: Tensor) -> Tensor:
        return torch.cat((shares, 1 - shares.amax(dim=1, keepdim=True)), dim=1)


@dataclass
class OwnPlaces(_Places):
    """Rows of a batch that have one subject each: row b's is candidate b, and goes where ``masks``
    (B,H,W) in [0,1] is at least a half."""

    @property
    def candidates(self) -> int:
        """B + 1."""
        return len(self.masks) + 1

    def _made(self, shares: Tensor) -> Tensor:
        rows = range(len(shares))
        maps = shares.new_zeros(len(shares), self.candidates, shares.shape[1])
        maps[rows, rows] = (shares >= 0.5).to(shares)
        maps[:, -1] = (shares < 0.5).to(shares)
        return maps


def _joined(parts: Sequence[SoftMaps]) -> SoftMaps:
    return SoftMaps(torch.cat([p.maps for p in parts]), parts[0].grid)
