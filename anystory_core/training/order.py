"""Which sample a run draws as number p: a function of the seed and p alone.

Samples are in pools. Numbers go by in units; a unit draws all of its samples from one pool, which
is chosen so that each pool gets its share of any long row of units, and pools are gone through in a
new random order each time. With one pool and units of one, number p is entry
``permutation(seed, p // n)[p % n]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError

Positions = np.ndarray[Any, np.dtype[np.int64]]

_BLOCK = 4096  # units whose pools are drawn at once


class Order:
    """``pools`` of positions, none empty, with their ``shares`` of the units."""

    def __init__(
        self, pools: Sequence[Positions], shares: Sequence[float], seed: int, *, unit: int = 1
    ) -> None:
        if not pools or any(not len(pool) for pool in pools) or min(shares) <= 0:
            raise ConfigError("data: every source of samples needs some, and a share above 0")
        self._pools, self._seed, self._unit = tuple(pools), seed, unit
        self._ends = np.cumsum(np.asarray(shares, np.float64) / sum(shares))
        self._blocks: list[np.ndarray[Any, np.dtype[np.int64]]] = []  # pool of each unit
        # Units of each pool before each block.
        self._before = [np.zeros(len(pools), np.int64)]
        self._cycles: dict[int, tuple[int, Positions]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._pools))

    def pool(self, number: int) -> int:
        """The pool of sample ``number``."""
        block, place = divmod(number // self._unit, _BLOCK)
        return int(self._block(block)[place]) if len(self._pools) > 1 else 0

    def position(self, number: int) -> int:
        """The position of sample ``number``."""
        unit, inside = divmod(number, self._unit)
        pool = 0
        if len(self._pools) > 1:
            block, place = divmod(unit, _BLOCK)
            pools = self._block(block)
            pool = int(pools[place])
            earlier = int(np.count_nonzero(pools[:place] == pool))
            unit = int(self._before[block][pool]) + earlier
        cycle, place = divmod(unit * self._unit + inside, len(self._pools[pool]))
        return int(self._permuted(pool, cycle)[place])

    def _block(self, block: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The pool of every unit of a block: as many of each as its share, in random order."""
        while len(self._blocks) <= block:
            random = np.random.default_rng((self._seed, 1, len(self._blocks)))
            spread = (np.arange(_BLOCK) + random.random()) / _BLOCK
            pools = np.searchsorted(self._ends, spread, side="right").clip(max=len(self._ends) - 1)
            self._blocks.append(random.permutation(pools))
            counts = np.bincount(pools, minlength=len(self._ends))
            self._before.append(self._before[-1] + counts)
        return self._blocks[block]

    def _permuted(self, pool: int, cycle: int) -> Positions:
        known = self._cycles.get(pool)
        if known is None or known[0] != cycle:
            random = np.random.default_rng((self._seed, 2, pool, cycle))
            known = cycle, random.permutation(self._pools[pool])
            self._cycles[pool] = known
        return known[1]
