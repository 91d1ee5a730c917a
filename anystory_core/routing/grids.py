"""Grids of tokens, the part of the picture that a call sees, and maps carried from grid to grid."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .router import RoutingLogits

Grid = tuple[int, int]  # height and width in tokens


@dataclass(frozen=True)
class Crop:
    """The part of the latent that a row of a call sees, in latent pixels (area conditioning); and
    which picture of the batch, where masks differ from picture to picture."""

    y: int
    x: int
    height: int
    width: int
    full_height: int
    full_width: int
    picture: int = 0

    def narrow(self, mask: Tensor) -> Tensor:
        """Cut a mask (H,W) to the same part, at least one pixel of it."""
        rows, columns = mask.shape
        top = min(self.y * rows // self.full_height, rows - 1)
        left = min(self.x * columns // self.full_width, columns - 1)
        bottom = max(-(-(self.y + self.height) * rows // self.full_height), top + 1)
        right = max(-(-(self.x + self.width) * columns // self.full_width), left + 1)
        return mask[top:bottom, left:right]


Crops = Sequence[Crop | None]  # one per row; None or nothing at all: the whole picture


@dataclass(frozen=True)
class SoftMaps:
    """Routing maps of one block: ``maps`` (B,C,Q) float32 on ``grid``.

    ``logits`` are there when a router made them (training needs the coarse ones too)."""

    maps: Tensor
    grid: Grid
    logits: RoutingLogits | None = None


def product(down: Tensor, image: Tensor, across: Tensor) -> Tensor:
    """Both matrices on the last two axes of an image, in its own precision."""
    # Only where it is on: DirectML and the meta device, on which sizes are counted, have none.
    kind = image.device.type
    mixed = not image.is_meta and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if mixed else nullcontext():
        return torch.matmul(torch.matmul(down, image), across)


def area_shares(before: int, after: int, like: Tensor) -> Tensor:
    """(after,before): what share of each new place each of the old ones covers. Counted in whole
    units of 1 / (before * after) of the side, so that shares are exact; as a product of matrices,
    because Apple's GPUs have no mean over areas where sizes do not divide."""
    old = torch.arange(before, device=like.device) * after
    new = torch.arange(after, device=like.device)[:, None] * before
    shared = torch.minimum(old + after, new + before) - torch.maximum(old, new)
    return shared.clamp_min(0) / like.new_full((), before)  # of the dtype of ``like``


def area_mean(image: Tensor, grid: Grid) -> Tensor:
    """(...,h,w) -> (...,*grid): each new place is the mean of what it covers."""
    sides = tuple(zip(image.shape[-2:], grid, strict=True))
    if image.ndim in (3, 4) and not any(before % after for before, after in sides):
        blocks = [before // after for before, after in sides]
        return torch.nn.functional.avg_pool2d(image, blocks)
    down, across = (area_shares(before, after, image) for before, after in sides)
    return product(down, image, across.t())


def resize_soft(soft: SoftMaps, grid: Grid) -> SoftMaps:
    """Area average when shrinking, bilinear when growing."""
    if soft.grid == grid:
        return soft
    image = soft.maps.reshape(*soft.maps.shape[:2], *soft.grid)  # (B,C,h,w)
    if grid[0] * grid[1] < soft.grid[0] * soft.grid[1]:
        image = area_mean(image, grid)
    else:
        image = torch.nn.functional.interpolate(
            image, size=grid, mode="bilinear", align_corners=False
        )
    return SoftMaps(image.flatten(2), grid)


def mean_over_blocks(blocks: Sequence[SoftMaps], grid: Grid) -> Tensor:
    """(B,C,Q) on ``grid``. Blocks of one grid are summed before they are resized, so the cost does
    not grow with their number. ValueError when there is none."""
    if not blocks:
        raise ValueError("mean_over_blocks: no block has a map")
    sums: dict[Grid, Tensor] = {}
    for soft in blocks:
        sums[soft.grid] = sums[soft.grid] + soft.maps if soft.grid in sums else soft.maps
    resized = [resize_soft(SoftMaps(total, of), grid).maps for of, total in sums.items()]
    return torch.stack(resized).sum(dim=0) / len(blocks)
