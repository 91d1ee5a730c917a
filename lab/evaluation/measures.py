"""The measures, as functions of numbers and tensors alone. They do not change with results."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anystory_core.routing.grids import Grid
from anystory_core.routing.segment import ceiling, masks_of
from anystory_core.training.losses import target_maps

Z = 1.959963984540054  # 95 % of a normal distribution lies within +-Z
_DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from ``count`` samples."""

    value: float
    low: float
    high: float
    count: int


def wilson(successes: int, count: int) -> Estimate:
    """A proportion with Wilson's score interval. ValueError without samples."""
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"wilson: got {successes} of {count}")
    share = successes / count
    scale = 1 + Z**2 / count
    middle = (share + Z**2 / (2 * count)) / scale
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / scale
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half), count)


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """A mean with the percentile interval of 2000 resamples. ValueError without samples."""
    if not values:
        raise ValueError("bootstrap: got no values")
    rng, count = random.Random(seed), len(values)
    means = sorted(sum(rng.choices(values, k=count)) / count for _ in range(_DRAWS))
    low, high = means[round(0.025 * (_DRAWS - 1))], means[round(0.975 * (_DRAWS - 1))]
    return Estimate(sum(values) / count, low, high, count)


def top1(embeddings: Tensor, gallery: Tensor) -> list[int]:
    """Unit vectors (P,D) -> for each the nearest row of the gallery (C,D)."""
    return [int(i) for i in (embeddings @ gallery.t()).argmax(dim=1)]


def all_found(names: Sequence[int], wanted: Sequence[int]) -> bool:
    """Every wanted subject is the name of exactly one found place."""
    return all(list(names).count(subject) == 1 for subject in wanted)


def assign(similarity: Tensor) -> list[tuple[int, int]]:
    """Pairs (place, subject) of (P,N) similarities, each used once, with the largest sum."""
    places, subjects = similarity.shape
    turned = places < subjects
    table = similarity.t() if turned else similarity
    few = range(table.shape[1])
    best = max(
        itertools.permutations(range(table.shape[0]), len(few)),
        key=lambda chosen: sum(float(table[p, n]) for p, n in zip(chosen, few, strict=True)),
    )
    pairs = [(p, n) for p, n in zip(best, few, strict=True)]
    return [(n, p) for p, n in pairs] if turned else pairs


def blended(embeddings: Tensor, subjects: Tensor) -> bool:
    """Some found subject is nearer to another subject, or to an even mixture with it, than to its
    own. embeddings (P,D) of the found places, subjects (N,D), unit vectors; each place counts for
    the subject that :func:`assign` gives it."""
    similarity = embeddings @ subjects.t()
    for place, own in assign(similarity):
        for other in range(len(subjects)):
            if other == own:
                continue
            mixture = torch.nn.functional.normalize(subjects[own] + subjects[other], dim=0)
            rival = max(float(similarity[place, other]), float(embeddings[place] @ mixture))
            if rival > float(similarity[place, own]):
                return True
    return False


def mean_iou(found: Tensor, true: Tensor) -> float:
    """Mean over subjects of the intersection over union of their masks (N,...), 0 or 1; subjects
    that are in neither are left out, 1 when all are."""
    a, b = (found > 0.5).flatten(1), (true > 0.5).flatten(1)
    union, both = (a | b).sum(dim=1), (a & b).sum(dim=1)
    there = union > 0
    return float((both[there] / union[there]).mean()) if bool(there.any()) else 1.0


def grid_iou(maps: Tensor, true: Tensor, grid: Grid) -> float:
    """A block's map (N+1,h*w) by its argmax, against the true masks (N,H,W) on its own grid."""
    subjects = true.shape[0]
    wanted = target_maps(true[None], grid)[0, :subjects]
    winner = maps.argmax(dim=0)
    return mean_iou(torch.stack([winner == i for i in range(subjects)]).float(), wanted)


def picture_iou(maps: Tensor, true: Tensor) -> float:
    """Soft maps (N+1,h,w), enlarged, by their argmax, against the true masks (N,H,W)."""
    return mean_iou(masks_of(maps, (true.shape[1], true.shape[2])), true)


def mean_ceiling(true: Tensor, grid: Grid) -> float:
    """What perfect masks reach at picture resolution when they are given on ``grid`` only."""
    values = ceiling(true, grid)
    return sum(values) / len(values)


def pose_matches(angle: float, flipped: bool, other_angle: float, other_flipped: bool) -> bool:
    """Whether two poses agree: flipped alike, and angles at most 7.5 degrees apart."""
    return flipped == other_flipped and abs(angle - other_angle) <= 7.5
