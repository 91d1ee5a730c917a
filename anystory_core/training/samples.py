"""The samples of a run: where they come from, which are held out, and how often each is drawn."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ..data.index import Entry, Index
from ..data.parts import Kind
from ..errors import DataError
from .config import TrainingConfig
from .order import Positions

_PAIRS: tuple[Kind, ...] = ("pair", "group")
_SCENES: tuple[Kind, ...] = ("scene",)
_HELD_OUT_SEED = 20_240_611
_MOST_HELD_OUT = 50  # at most one sample of so many is held out
_LEAST_HELD_OUT = 8  # fewer say nothing


class Samples:
    """The samples of several sources, by position."""

    def __init__(self, indexes: Sequence[Index]) -> None:
        self._indexes = tuple(indexes)
        self._ends = list(accumulate(map(len, indexes)))

    @classmethod
    def of(cls, paths: Sequence[str]) -> Samples:
        """Scan folders and shards. DataError names a path without samples."""
        return cls([Index.of((path,)) for path in paths])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, position: int) -> Entry:
        source = bisect_right(self._ends, position)
        return self._indexes[source][position - (self._ends[source - 1] if source else 0)]

    def of_kinds(self, source: int, kinds: Sequence[Kind], *, whole: bool = False) -> Positions:
        """Positions of a source's samples of these kinds; unless ``whole``, also of those of none
        because a file is missing: reading them says so, and they count as corrupt."""
        start = self._ends[source - 1] if source else 0
        return self._indexes[source].of_kinds(kinds, whole=whole) + start


@dataclass(frozen=True)
class Pools:
    """What a run draws from, and with what shares; ``held_out`` is never drawn. ``notes`` say to
    the user what is left out."""

    positions: tuple[Positions, ...]
    shares: tuple[float, ...]
    held_out: Positions
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(np.unique(np.concatenate(self.positions)))


def kinds_of(config: TrainingConfig) -> dict[tuple[Kind, ...], float]:
    """The kinds of samples that a stage draws, with their shares; of a group, two views."""
    if config.subject is None:
        return {_SCENES: 1.0}
    shares = {_PAIRS: 1 - config.subject.scenes, _SCENES: config.subject.scenes}
    return {kinds: share for kinds, share in shares.items() if share}


def draw_pools(samples: Samples, config: TrainingConfig) -> Pools:
    """Pools by source, where sources name shares, and by kind. DataError: a kind is missing."""
    origins, kinds = config.data.origins, kinds_of(config)
    shared = any(origin.share for origin in origins)
    held_out = _held_out(samples, config, list(kinds))
    pools: list[Positions] = []
    shares: list[float] = []
    for number, (kind, share) in enumerate(kinds.items()):
        found = [samples.of_kinds(i, kind, whole=number > 0) for i in range(len(origins))]
        if not any(len(samples.of_kinds(i, kind, whole=True)) for i in range(len(origins))):
            raise DataError(_nothing(config, kind, samples))
        found = [np.setdiff1d(positions, held_out) for positions in found]
        repeated = [
            np.tile(positions, origin.repeats)
            for positions, origin in zip(found, origins, strict=True)
        ]
        if not shared:
            pools.append(np.concatenate(repeated))
            shares.append(share)
            continue
        there = [origin.share if len(p) else 0.0 for p, origin in zip(found, origins, strict=True)]
        pools += [p for p in found if len(p)]
        shares += [share * own / sum(there) for own in there if own]
    return Pools(tuple(pools), tuple(shares), held_out, _notes(samples, config, held_out))


def _held_out(
    samples: Samples, config: TrainingConfig, kinds: Sequence[tuple[Kind, ...]]
) -> Positions:
    """Samples that validation sees and training does not: the same ones in every run on this data.
    None when validation has data of its own, or the run has too few."""
    settings = config.validation
    sources = range(len(config.data.origins))
    every = np.concatenate(
        [samples.of_kinds(i, kind, whole=True) for kind in kinds for i in sources]
    )
    count = min(settings.samples, len(every) // _MOST_HELD_OUT)
    if not settings.every or settings.paths or count < _LEAST_HELD_OUT:
        return np.zeros(0, np.int64)
    return np.sort(np.random.default_rng(_HELD_OUT_SEED).choice(every, count, replace=False))


def _nothing(config: TrainingConfig, kind: tuple[Kind, ...], samples: Samples) -> str:
    hint = "see docs/data.md"
    if config.subject is not None and kind == _PAIRS:
        hint = "scenes alone teach to copy the target; subject.scenes = 1 takes them all the same"
    return (
        f"data: stage {config.stage!r} needs samples of kind {' or '.join(kind)}, found none among "
        f"{len(samples)}; {hint}"
    )


def _notes(samples: Samples, config: TrainingConfig, held_out: Positions) -> tuple[str, ...]:
    notes: list[str] = []
    sources = range(len(config.data.origins))
    if config.subject is not None and not config.subject.scenes:
        scenes = sum(len(samples.of_kinds(i, _SCENES, whole=True)) for i in sources)
        if scenes:
            notes.append(
                f"{scenes} scenes are left out: their references would be cut from the targets "
                "themselves; subject.scenes gives them a share"
            )
    elif config.subject is not None:
        notes.append(
            f"{config.subject.scenes:.0%} of the samples are scenes, whose references are cut from "
            "the targets themselves"
        )
    if len(held_out):
        notes.append(f"{len(held_out)} samples are held out for validation")
    elif config.validation.every and not config.validation.paths:
        notes.append(
            f"no validation: {_LEAST_HELD_OUT * _MOST_HELD_OUT} samples or more would be needed to "
            "hold some out; validation.paths names others"
        )
    return tuple(notes)
