"""The routes of one sampling run, recorded: region ids of every block, by noise level and by row.

A sampler may call the model once a step, several times, or not at all; a call may show all rows of
the batch or some. So what a call shows is filed under its noise level and its rows, and the step is
the one in whose range of noise the level lies.

Ids are small (one byte per token): 25 steps x 70 blocks of SDXL at 1024 squared are about 3 MB a
row. Soft maps are kept only when asked for. Subject i has id i; the background has id N.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bases.base import Site
from ..errors import RoutingError
from .grids import Grid

SAME_LEVEL = 1e-4  # relative; samplers that compute with log sigma do not return it exactly
_NOT_SHOWN = 255  # id of a row that no call has shown


def require_routes(maps: Sized) -> None:
    """RoutingError when nothing was recorded."""
    if not maps:
        raise RoutingError(
            "maps: no routes were recorded; the subjects may have been inactive (strength 0, or "
            "outside start and end)"
        )


@dataclass
class LevelRecord:
    """Routes at one noise level, by block number l."""

    sigma: float
    active: tuple[bool, ...]  # subjects inside their window
    step: int = 0  # number of the sampler's step, from 0
    ids: dict[int, Tensor] = field(default_factory=dict[int, Tensor])  # l -> (rows,Q) uint8
    grids: dict[int, Grid] = field(default_factory=dict[int, Grid])
    soft: dict[int, Tensor] = field(default_factory=dict[int, Tensor])  # l -> (rows,C,Q) fp16
    everywhere: bool = False  # one subject had every place, because none was known yet

    def shows(self, row: int) -> bool:
        """Whether any block was recorded for this row of the batch."""
        return any(self._has(index, row) for index in self.ids)

    def map(self, index: int, row: int) -> Tensor | None:
        """Region ids (h,w) uint8 of block ``index``, or None where it was not recorded."""
        return self.ids[index][row].reshape(self.grids[index]) if self._has(index, row) else None

    def _has(self, index: int, row: int) -> bool:
        ids = self.ids.get(index)
        return ids is not None and row < ids.shape[0] and int(ids[row, 0]) != _NOT_SHOWN


@dataclass(frozen=True)
class CallRecorder:
    """Files one call of the U-Net, whose recorded rows are ``rows`` of a batch of ``size``, under
    its noise level. Implements :class:`~..injection.call.Recorder`."""

    level: LevelRecord
    rows: tuple[int, ...]
    size: int
    keep_soft: bool

    def record(self, index: int, ids: Tensor, grid: Grid, soft: Tensor) -> None:
        """Keep block ``index``: ids (rows,Q), soft (rows,C,Q). Stays on the device until the run
        ends, so that sampling never waits for a copy."""
        level = self.level
        if level.grids.get(index) != grid:  # another pack's; maps of two sizes are not one
            level.ids.pop(index, None)
            level.soft.pop(index, None)
        level.grids[index] = grid
        level.ids[index] = self._merged(level.ids.get(index), ids, _NOT_SHOWN)
        if self.keep_soft:
            level.soft[index] = self._merged(level.soft.get(index), soft.half(), 0)

    def _merged(self, kept: Tensor | None, new: Tensor, empty: int) -> Tensor:
        """``new`` (rows,...) in its places of the whole batch (size,...)."""
        if self.rows == tuple(range(self.size)):
            return new
        whole = new.new_full((self.size, *new.shape[1:]), empty) if kept is None else kept.clone()
        whole[list(self.rows)] = new
        return whole


@dataclass
class RoutingRecord:
    """All recorded noise levels of a run, from the highest to the lowest.

    ``schedule``: the noise levels that the sampler was given, one more than it has steps. ``rows``:
    size of the latent batch."""

    labels: tuple[str, ...]
    sites: tuple[Site, ...]
    schedule: tuple[float, ...] = ()
    rows: int = 1
    keep_soft: bool = False
    idle: bool = False  # no subject acted in the run, so there is nothing to record
    tiled: bool = False  # levels are missing that were drawn in tiles, which show no whole picture
    levels: list[LevelRecord] = field(default_factory=list[LevelRecord])
    _latest: LevelRecord | None = None

    def call(self, sigma: float, active: Sequence[bool], rows: Sequence[int] = ()) -> CallRecorder:
        """Where a call of the U-Net at noise level ``sigma`` files what it shows of ``rows``. A
        later call at the same level has the last word."""
        level = next((each for each in self.levels if _same(each.sigma, sigma)), None)
        if level is None:
            level = LevelRecord(sigma, tuple(active), self._step_of(sigma))
            self.levels.append(level)
            self.levels.sort(key=lambda each: -each.sigma)
        self._latest = level
        return CallRecorder(level, tuple(rows), self.rows, self.keep_soft)

    def sampled(self, step: int) -> None:
        """The sampler reports the step of the calls since its last report. Samplers that raise the
        noise first, and packs that show the model another noise level than the sampler's, may have
        crossed the border to a step beside it."""
        latest, self._latest = self._latest, None
        if latest is None or abs(latest.step - step) != 1:
            return
        if all(each.step != step for each in self.levels):
            latest.step = step

    def _step_of(self, sigma: float) -> int:
        """Number of the step that goes from a level at or above ``sigma`` to one below it."""
        starts = self.schedule[:-1]
        return max(0, sum(start >= sigma or _same(start, sigma) for start in starts) - 1)

    def finish(self) -> None:
        """Bring all routes to the CPU, once, after the last step."""
        for level in self.levels:
            level.ids = {index: ids.cpu() for index, ids in level.ids.items()}
            level.soft = {index: soft.cpu() for index, soft in level.soft.items()}

    @property
    def subjects(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def steps(self) -> int:
        """Number of the sampler's steps, recorded or not."""
        return max(len(self.schedule) - 1, *(level.step + 1 for level in self.levels), 0)

    @property
    def size(self) -> int:
        """Bytes of all recorded maps."""
        maps = [m for level in self.levels for m in (*level.ids.values(), *level.soft.values())]
        return sum(m.numel() * m.element_size() for m in maps)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of all blocks that were recorded at any level, in forward order."""
        return tuple(sorted({index for level in self.levels for index in level.ids}))

    def levels_of(self, row: int) -> list[LevelRecord]:
        """The levels at which batch row ``row`` was recorded. RoutingError: an unknown row, or
        there are none."""
        require_routes(self.blocks)
        if not 0 <= row < self.rows:
            raise RoutingError(f"batch_index: got {row}, expected 0 to {self.rows - 1}")
        levels = [level for level in self.levels if level.shows(row)]
        require_routes(levels)
        return levels

    def votes(self, row: int) -> Tensor:
        """Share of blocks and levels that gave each token to each candidate: (N+1,h,w) float in
        [0,1] on the finest recorded grid. Coarser blocks vote for all tokens they cover. Levels at
        which one subject had every place have no vote, unless there are no others."""
        # Summed on each grid first: a run of SDXL has thousands of maps on two or three grids.
        ids: dict[Grid, list[Tensor]] = {}
        levels = self.levels_of(row)
        for level in [each for each in levels if not each.everywhere] or levels:
            for index, grid in level.grids.items():
                drawn = level.map(index, row)
                if drawn is not None:
                    ids.setdefault(grid, []).append(drawn.flatten())
        finest = max(ids, key=lambda g: g[0] * g[1])
        total = torch.zeros(self.subjects + 1, *finest)
        for grid, rows in ids.items():
            stacked = torch.stack(rows)  # (maps,Q)
            votes = torch.stack([(stacked == i).sum(dim=0) for i in range(self.subjects + 1)])
            drawn = votes.float().reshape(1, -1, *grid)
            total += torch.nn.functional.interpolate(drawn, size=finest, mode="nearest")[0]
        return total / sum(map(len, ids.values()))

    def consensus(self, row: int) -> Tensor:
        """Region ids (h,w) int64 by majority over blocks and levels, on the finest grid."""
        return self.votes(row).argmax(dim=0)

    def masks(self, row: int, size: tuple[int, int]) -> Tensor:
        """The consensus as N masks (N,H,W), 0 or 1, at picture size; smooth outlines: the votes are
        enlarged before the majority is taken."""
        votes = torch.nn.functional.interpolate(
            self.votes(row)[None], size=size, mode="bilinear", align_corners=False
        )[0]
        winner = votes.argmax(dim=0)
        return torch.stack([(winner == i).float() for i in range(self.subjects)])

    def shares(self, row: int) -> tuple[float, ...]:
        """Fraction of the picture that each subject got in the consensus, then the background's."""
        winner = self.consensus(row)
        return tuple(float((winner == i).float().mean()) for i in range(self.subjects + 1))


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= SAME_LEVEL * max(one, other)
