"""Figures of single samples, for validation: what a loss hides in its mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..routing.grids import Grid, SoftMaps, mean_over_blocks, resize_soft
from .batches import Batch
from .losses import finer_masks, subject_area


@torch.no_grad()
def row_figures(
    predicted: Tensor, target: Tensor, batch: Batch, maps: Sequence[SoftMaps]
) -> dict[str, Tensor]:
    """Of each row (B): Eq. 1 over the picture, inside and outside of its subjects; with the maps of
    all blocks, how far the routes' masks overlap the true ones ("routing_iou"). NaN where a row has
    no mask."""
    errors = (predicted.float() - target.float()).square().mean(dim=1, keepdim=True)
    inside = subject_area(batch.masks, errors)
    known = inside.flatten(1).any(dim=1)
    figures = {
        "error": errors.mean(dim=(1, 2, 3)),
        "inside": _where(known, _mean(errors, inside)),
        "outside": _where(known, _mean(errors, 1 - inside)),
    }
    if maps:
        height, width = predicted.shape[-2:]
        figures["routing_iou"] = routing_iou(maps, batch, (height, width))
    return figures


def routing_iou(maps: Sequence[SoftMaps], batch: Batch, grid: Grid) -> Tensor:
    """Of each row (B), the mean over its subjects of intersection over union of the true mask and
    of the one that the mean map over blocks gives (:mod:`..routing.segment`); NaN without any."""
    size, finer = finer_masks(batch.masks, grid)
    true = finer > 0.5
    mean = resize_soft(SoftMaps(mean_over_blocks(maps, grid), grid), size).maps
    winner = mean.argmax(dim=1, keepdim=True)
    numbers = torch.arange(true.shape[1], device=true.device)[None, :, None]
    found = winner == numbers  # (B,N,Q)
    both, either = (found & true).sum(dim=-1), (found | true).sum(dim=-1)
    counted = batch.present & true.any(dim=-1)
    overlap = torch.where(counted, both / either.clamp_min(1), 0.0).sum(dim=1)
    return _where(counted.any(dim=1), overlap / counted.sum(dim=1).clamp_min(1))


def _mean(errors: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum(dim=(1, 2, 3)).clamp_min(1e-6)
    return (errors * weights).sum(dim=(1, 2, 3)) / total


def _where(known: Tensor, values: Tensor) -> Tensor:
    return torch.where(known, values, torch.nan)
