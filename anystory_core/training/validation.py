"""Held-out samples at fixed noise levels with fixed noise: whether a run still learns what it
should, and where."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .batches import Batch
from .cache import Encodings
from .dataset import SampleDataset
from .noise import Noised, draw_noise, gumbel_seeds, make_noised
from .ranks import Ranks
from .schedule import Schedule

_SEED = 7_919  # of the noise: not that of any run, so that runs can be compared

Measure = Callable[[Batch, Noised], dict[str, Tensor]]  # figures of each row (B)


class Validation:
    """``dataset`` holds the samples, ``count`` of them, unchanged; processes share them out."""

    def __init__(
        self, dataset: SampleDataset, count: int, encodings: Encodings, schedule: Schedule
    ) -> None:
        self.dataset, self.count = dataset, count
        self.encodings, self.schedule = encodings, schedule
        self.settings = dataset.config.validation
        self.batch = dataset.config.run.batch

    def bins(self) -> list[range]:
        """Timesteps, cut into ``validation.levels`` pieces."""
        edges = [
            len(self.schedule) * i // self.settings.levels for i in range(self.settings.levels)
        ]
        return [range(a, b) for a, b in zip(edges, [*edges[1:], len(self.schedule)], strict=True)]

    @torch.no_grad()
    def run(self, measure: Measure, ranks: Ranks) -> dict[str, float]:
        """Means of each figure over all samples, for each piece of the timesteps and over all of
        them. Every process makes as many passes, which sharded weights need."""
        bins = self.bins()
        sums: dict[str, Tensor] = {}
        for numbers in self._shares(ranks):
            known = torch.tensor([number < self.count for number in numbers])
            rows = [self.dataset[number % self.count] for number in numbers]
            batch = Batch.join(rows).to(ranks.device)
            encoded = self.encodings.encode(batch)
            for piece in bins:
                middle = torch.full((len(numbers),), (piece.start + piece.stop) // 2)
                noise = draw_noise(encoded.latents.shape[1:], numbers, _SEED + piece.start)
                seeds = gumbel_seeds(_SEED, numbers)
                figures = measure(batch, make_noised(self.schedule, encoded, noise, middle, seeds))
                for name, values in figures.items():
                    own = torch.where(known.to(values.device), values.double(), math.nan)
                    there = torch.isfinite(own)
                    total = torch.stack((torch.where(there, own, 0.0).sum(), there.sum()))
                    for key in (name, f"{name} {piece.start}-{piece.stop - 1}"):
                        sums[key] = sums[key] + total if key in sums else total
        return self._means(sums, ranks)

    def _shares(self, ranks: Ranks) -> Sequence[list[int]]:
        """Numbers of each of this process's batches; those beyond the last sample repeat some, and
        do not count."""
        own = ranks.index * self.batch
        firsts = range(own, own + self.count, self.batch * ranks.count)
        return [list(range(first, first + self.batch)) for first in firsts]

    def _means(self, sums: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
        parts = {f"{name}|{i}": total[i] for name, total in sums.items() for i in range(2)}
        means = ranks.mean(parts)
        return {
            name: means[f"{name}|0"] / means[f"{name}|1"] for name in sums if means[f"{name}|1"]
        }
