"""Where a route comes from: the trained router, the user's masks, or one subject everywhere.

A source answers with soft maps (B,C,Q) in float32, C = N subjects and the background last; the
conditioner takes their argmax as the route. Masks live in picture space, 1 = subject.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..bases.base import Site
from .grids import Crop, Crops, Grid, SoftMaps, area_mean, resize_soft
from .masks import count_of, mask_of
from .router import RouterKeys, Routers


class RouteSource(Protocol):
    """Gives the soft maps of a block, and carries them to another grid."""

    @property
    def candidates(self) -> int:
        """N + 1."""
        ...

    @property
    def pictures(self) -> int:
        """How many pictures of a batch have masks of their own; 1: all have the same or none."""
        ...

    def maps(self, site: Site, z: Tensor, grid: Grid, crops: Crops) -> SoftMaps:
        """z (B,Q,D) is the block's ``norm2`` output."""
        ...

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        """The same maps on another grid."""
        ...


@dataclass(frozen=True)
class MaskRoutes:
    """The user's masks as routes: background 1 - max, ties to the lower number.

    ``masks``: one (H,W) or (M,H,W) tensor in [0,1] per subject, of any size; each covers the whole
    picture. Of M, row b takes the one that its crop names; all M are the same or 1."""

    masks: tuple[Tensor, ...]
    _cache: dict[tuple[Grid, Crop | None, torch.device], Tensor] = field(
        default_factory=dict[tuple[Grid, "Crop | None", torch.device], Tensor],
        compare=False,
        repr=False,
    )

    @property
    def candidates(self) -> int:
        return len(self.masks) + 1

    @property
    def pictures(self) -> int:
        return max((count_of(mask) for mask in self.masks), default=1)

    def subject_weights(self, grid: Grid, crops: Crops, device: torch.device) -> Tensor:
        """Area-resized masks: (rows,N,Q) for as many rows as there are crops, else (1,N,Q)."""
        rows = [self._resized(grid, crop, device) for crop in dict.fromkeys(crops or (None,))]
        if len(rows) == 1:
            return rows[0][None]
        of = {crop: row for crop, row in zip(dict.fromkeys(crops), rows, strict=True)}
        return torch.stack([of[crop] for crop in crops])

    def allowed(self, grid: Grid, crops: Crops, device: torch.device) -> Tensor:
        """(1|rows,N+1,Q) bool: subject i where mask_i >= 0.5, the background everywhere."""
        inside = self.subject_weights(grid, crops, device) >= 0.5
        return torch.cat((inside, torch.ones_like(inside[:, :1])), dim=1)

    def confine(self, soft: SoftMaps, crops: Crops) -> SoftMaps:
        """Maps without what lies outside the masks of their grid; a token that keeps nothing is
        the background's."""
        allowed = self.allowed(soft.grid, crops, soft.maps.device)
        maps = soft.maps * allowed
        lost = maps.amax(dim=1, keepdim=True) <= 0
        return SoftMaps(torch.cat((maps[:, :-1], maps[:, -1:] + lost), dim=1), soft.grid)

    def _resized(self, grid: Grid, crop: Crop | None, device: torch.device) -> Tensor:
        """(N,Q); a run asks for the same few grids at every block and step, so each is copied to
        its device once."""
        key = grid, crop, device
        if key not in self._cache:
            masks = [mask_of(mask, 0 if crop is None else crop.picture) for mask in self.masks]
            masks = [m if crop is None else crop.narrow(m) for m in masks]
            weights = torch.stack([area_mean(m, grid).flatten() for m in masks])
            self._cache[key] = weights.to(device)
        return self._cache[key]

    def maps(self, site: Site, z: Tensor, grid: Grid, crops: Crops) -> SoftMaps:
        return self._on(grid, crops, z.shape[0], z.device)

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        return self._on(grid, crops, soft.maps.shape[0], soft.maps.device)

    def _on(self, grid: Grid, crops: Crops, batch: int, device: torch.device) -> SoftMaps:
        weights = self.subject_weights(grid, crops, device)
        background = 1 - weights.amax(dim=1, keepdim=True)
        maps = torch.cat((weights, background), dim=1).expand(batch, -1, -1)
        return SoftMaps(maps, grid)


@dataclass(frozen=True)
class LearnedRoutes:
    """The trained router; ``masks`` forbid subject i where mask_i < 0.5 ("learned within masks").

    ``keys`` are the routers with their routing features, by block. ``present`` (B,C) bool marks
    real candidates where rows hold different numbers of subjects (training)."""

    keys: Mapping[int, RouterKeys]
    candidates: int
    masks: MaskRoutes | None = None
    present: Tensor | None = None

    @classmethod
    def prepare(
        cls,
        routers: Routers,
        routing: Tensor,
        *,
        masks: MaskRoutes | None = None,
        present: Tensor | None = None,
    ) -> LearnedRoutes:
        """Fold the routing features (R,C,E), R = 1 or B, into every block's router."""
        keys = {index: router.prepare(routing) for index, router in routers.items()}
        return cls(keys, routing.shape[1], masks, present)

    def maps(self, site: Site, z: Tensor, grid: Grid, crops: Crops) -> SoftMaps:
        allowed = None if self.present is None else self.present[:, :, None]
        if self.masks is not None:
            allowed = self.masks.allowed(grid, crops, z.device)
        logits = self.keys[site.index].logits(z, allowed)
        return SoftMaps(logits.refined.softmax(dim=1), grid, logits)

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        resized = resize_soft(soft, grid)
        return resized if self.masks is None else self.masks.confine(resized, crops)

    @property
    def pictures(self) -> int:
        return 1 if self.masks is None else self.masks.pictures

    def of_run(self, masks: MaskRoutes | None) -> LearnedRoutes:
        """The same routes within other masks."""
        return replace(self, masks=masks)


@dataclass(frozen=True)
class SingleRoute:
    """Every token belongs to the only subject: files without a router, and training stage 1."""

    candidates: int = 2
    pictures: int = 1

    def maps(self, site: Site, z: Tensor, grid: Grid, crops: Crops) -> SoftMaps:
        maps = torch.zeros(z.shape[0], 2, z.shape[1], device=z.device)
        maps[:, 0] = 1
        return SoftMaps(maps, grid)

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        return resize_soft(soft, grid)
