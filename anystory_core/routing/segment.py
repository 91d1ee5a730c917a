"""Segmentation of an existing picture by the router (paper 3.3 end, Fig. 5).

The picture is encoded, noised, and seen once by the U-Net with the subjects routed; the mean of the
soft maps over blocks (and over several noises) says where each subject is. The one pass is an
ordinary recorded call, so this module only reads :class:`~.record.LevelRecord`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grids import SoftMaps, mean_over_blocks
from .record import LevelRecord, require_routes


def mean_maps(level: LevelRecord, size: tuple[int, int]) -> Tensor:
    """Mean soft map of all blocks and all recorded rows: (N+1,h,w) float32 in [0,1], summing to 1.

    ``size`` is usually the latent's grid. RoutingError: nothing was recorded.
    """
    require_routes(level.soft)
    blocks = [
        SoftMaps(soft.float().mean(dim=0, keepdim=True), level.grids[index])
        for index, soft in level.soft.items()
    ]
    return mean_over_blocks(blocks, size).reshape(-1, *size)


def masks_of(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Soft maps (N+1,h,w) -> N masks (N,H,W), 0 or 1, disjoint. Maps are enlarged before the
    largest is taken, so that outlines are smooth."""
    large = torch.nn.functional.interpolate(
        maps[None], size=size, mode="bilinear", align_corners=False
    )[0]
    winner = large.argmax(dim=0)
    return torch.stack([(winner == i).float() for i in range(maps.shape[0] - 1)])


def iou(found: Tensor, true: Tensor) -> tuple[float, ...]:
    """Intersection over union of each of N masks (N,H,W); 1 where both are empty."""
    a, b = found > 0.5, true > 0.5
    union = (a | b).flatten(1).sum(dim=1)
    both = (a & b).flatten(1).sum(dim=1)
    return tuple(1.0 if int(u) == 0 else int(n) / int(u) for n, u in zip(both, union, strict=True))


def ceiling(true: Tensor, grid: tuple[int, int]) -> tuple[float, ...]:
    """IoU that perfect masks reach when they are given on ``grid`` only: the best any map can do.

    true (N,H,W), 0 or 1, disjoint."""
    background = 1 - true.amax(dim=0, keepdim=True)
    coarse = torch.nn.functional.interpolate(
        torch.cat((true, background))[None], size=grid, mode="area"
    )[0]
    return iou(masks_of(coarse, (true.shape[1], true.shape[2])), true)


def noises(shape: Sequence[int], count: int, seed: int) -> Tensor:
    """``count`` independent noises (count, *shape) on the CPU, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, *shape), generator=generator)
