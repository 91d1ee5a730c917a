"""The two losses of the paper, Eq. 1 and Eq. 4, ways to weight the first, and a loss of the masks
that routes are read as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases.sdxl.prediction import Kind
from ..routing.grids import Grid, SoftMaps, mean_over_blocks, resize_soft
from .settings import LossSettings, Tokens

# Of the mean map before its largest candidate is taken: 0.55 against 0.45 becomes 0.77.
_SHARPNESS = 6.0
_FINER = 2  # masks are compared on this many times the mean map's grid, towards the picture's


@dataclass(frozen=True)
class Weighting:
    """How errors count beyond Eq. 1: ``settings``, for rows of these signal-to-noise ratios (B), of
    a base that predicts the noise or v."""

    settings: LossSettings
    snr: Tensor
    kind: Kind

    def errors(self, difference: Tensor) -> Tensor:
        """Of a difference (B,C,h,w): its square, or where ``huber`` is c > 0 the pseudo-Huber loss
        2c (sqrt(d^2 + c^2) - c), which is d^2 for small d and grows like 2c |d|."""
        c = self.settings.huber
        square = difference.square()
        return 2 * c * ((square + c * c).sqrt() - c) if c else square

    def rows(self) -> Tensor | None:
        """What each row counts, (B,1,1,1): min(SNR, gamma) / SNR where the noise is predicted,
        min(SNR, gamma) / (SNR + 1) where v is (Hang et al. 2023); None: all alike."""
        gamma = self.settings.min_snr
        if not gamma:
            return None
        divisor = self.snr if self.kind == "epsilon" else self.snr + 1
        return (self.snr.clamp_max(gamma) / divisor).reshape(-1, 1, 1, 1)


def diffusion_loss(
    prediction: Tensor,
    target: Tensor,
    weighting: Weighting | None = None,
    masks: Tensor | None = None,
    inside: float = 0.0,
) -> Tensor:
    """Eq. 1: mean squared error of what is predicted (B,C,h,w), in float32.

    With ``inside``, errors where a subject is count 1 + inside times as much; masks (B,N,H,W) in
    [0,1]. A picture's weights have mean 1: each counts alike, whatever its subjects cover."""
    difference = prediction.float() - target.float()
    errors = difference.square() if weighting is None else weighting.errors(difference)
    rows = None if weighting is None else weighting.rows()
    if rows is not None:
        errors = errors * rows
    if masks is None or not inside:
        return errors.mean()
    return (errors * error_weights(subject_area(masks, errors), inside)).mean()


def subject_area(masks: Tensor, like: Tensor) -> Tensor:
    """Masks (B,N,H,W) -> how much of each place of ``like`` (B,C,h,w) a subject covers, (B,1,h,w)
    in [0,1]."""
    area = torch.nn.functional.interpolate(masks.float(), size=like.shape[-2:], mode="area")
    return area.amax(dim=1, keepdim=True)


def error_weights(area: Tensor, inside: float) -> Tensor:
    """1 + inside where the subject is, scaled to a mean of 1 for each picture; area (B,1,h,w) in
    [0,1]."""
    weights = 1 + inside * area
    return weights / weights.mean(dim=(2, 3), keepdim=True)


def target_maps(masks: Tensor, grid: Grid) -> Tensor:
    """M^gt: instance masks (B,N,H,W) in [0,1] -> one-hot (B,N+1,h*w).

    Masks are averaged over each token's area, the background is what no mask covers, and the token
    goes to the largest of them; ties to the lower number. Absent subjects have empty masks."""
    resized = torch.nn.functional.interpolate(masks.float(), size=grid, mode="area").flatten(2)
    background = (1 - resized.sum(dim=1, keepdim=True)).clamp_min(0)
    candidates = torch.cat((resized, background), dim=1)  # (B,N+1,Q)
    winner = candidates.argmax(dim=1, keepdim=True)
    return torch.zeros_like(candidates).scatter_(1, winner, 1.0)


def map_error(maps: Tensor, target: Tensor, present: Tensor, tokens: Tokens) -> Tensor:
    """1/N sum_i ||M_i - M_i^gt||^2 of each row, then the mean over all rows.

    maps, target (B,N+1,Q); present (B,N) bool. Only subjects count, not the background. A row
    without subjects adds 0 and is counted, so that processes whose batches hold more or fewer of
    them weigh every row alike.

    The square is a sum over tokens or their mean; with "area" it is divided by what the two maps
    cover, ||M_i||^2 + ||M_i^gt||^2, and one token: V-Net's Dice loss (arXiv 1606.04797, section 3),
    to which a small subject that is missed is as wrong as a large one."""
    maps, target = maps[:, :-1], target[:, :-1]
    error = (maps - target).square()
    error = error.mean(dim=-1) if tokens == "mean" else error.sum(dim=-1)  # (B,N)
    if tokens == "area":
        error = error / (1 + maps.square().sum(dim=-1) + target.square().sum(dim=-1))
    return _mean_over_rows(error, present)


def _mean_over_rows(error: Tensor, present: Tensor) -> Tensor:
    """(B,N) -> the mean over each row's subjects, then over rows, those without any included."""
    rows = (error * present).sum(dim=1) / present.sum(dim=1).clamp_min(1)
    return rows.mean()


def routing_loss(
    soft_maps: Sequence[SoftMaps],
    masks: Tensor,
    present: Tensor,
    tokens: Tokens = "mean",
) -> tuple[Tensor, Tensor]:
    """Eq. 4 without lambda, as (refined, coarse), each the mean over blocks.

    The refined map's mask is the argmax of the coarse one and passes no gradient, so the coarse map
    is supervised in the same way, as in the segmentation decoder that the paper follows."""
    targets = {grid: target_maps(masks, grid) for grid in {soft.grid for soft in soft_maps}}

    def error(blocks: Sequence[SoftMaps]) -> Tensor:
        errors = [map_error(b.maps, targets[b.grid], present, tokens) for b in blocks]
        return torch.stack(errors).mean()

    return error(soft_maps), error([_coarse(soft) for soft in soft_maps])


def finer_masks(masks: Tensor, grid: Grid) -> tuple[Grid, Tensor]:
    """Masks (B,N,H,W) as what is read off a mean map on ``grid`` is held to: a size nearer to the
    picture's, and (B,N,Q) on it."""
    size = (_FINER * grid[0], _FINER * grid[1])
    finer = torch.nn.functional.interpolate(masks.float(), size=size, mode="area")
    return size, finer.flatten(2)


def mean_routing_loss(
    soft_maps: Sequence[SoftMaps], masks: Tensor, present: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """1 - intersection over union of the masks (B,N,H,W) and of those that the mean map over blocks
    gives, as (refined, coarse). ``grid`` is that of the mean map: the latent's.

    Masks are read off the mean map by the largest candidate of each place after it is enlarged
    (:mod:`..routing.segment`); here the largest is taken softly. Eq. 4 asks each block for itself,
    to be as sure as it can; of their mean it is better when the blocks that see more are
    surer than the others, and a place at an outline need only fall on its right side."""
    size, true = finer_masks(masks, grid)

    def error(blocks: Sequence[SoftMaps]) -> Tensor:
        mean = resize_soft(SoftMaps(mean_over_blocks(blocks, grid), grid), size).maps
        found = (_SHARPNESS * mean.clamp_min(1e-6).log()).softmax(dim=1)[:, :-1]
        both = (found * true).sum(dim=-1)
        either = found.sum(dim=-1) + true.sum(dim=-1) - both
        return _mean_over_rows(1 - both / either.clamp_min(1), present)

    return error(soft_maps), error([_coarse(soft) for soft in soft_maps])


def _coarse(soft: SoftMaps) -> SoftMaps:
    if soft.logits is None:
        raise ValueError("routing_loss needs the maps of a trained router")
    return SoftMaps(soft.logits.coarse.softmax(dim=1), soft.grid)
