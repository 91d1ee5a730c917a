"""The routes of one sampling run, recorded: region ids of every block at every step.

Ids are small (one byte per token): 25 steps x 70 blocks of SDXL at 1024 squared are about 3 MB a
row. Soft maps are kept only when asked for. Subject i has id i; the background has id N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bases.base import Site
from ..errors import RoutingError
from .grids import Grid


@dataclass
class StepRecord:
    """First U-Net call of one sampler step: routes by block number, for every recorded row."""

    sigma: float
    active: tuple[bool, ...]  # subjects inside their window
    ids: dict[int, Tensor] = field(default_factory=dict[int, Tensor])  # l -> (rows,Q) uint8
    grids: dict[int, Grid] = field(default_factory=dict[int, Grid])
    soft: dict[int, Tensor] = field(default_factory=dict[int, Tensor])  # l -> (rows,C,Q) fp16


@dataclass
class RoutingRecord:
    """All recorded steps of a run. Implements :class:`~..injection.call.Recorder`."""

    labels: tuple[str, ...]
    sites: tuple[Site, ...]
    keep_soft: bool = False
    idle: bool = False  # no subject acted in the run, so there is nothing to record
    tiled: bool = False  # steps are missing that were drawn in tiles, which show no whole picture
    steps: list[StepRecord] = field(default_factory=list[StepRecord])
    _pending: StepRecord | None = None

    def begin_step(self, sigma: float, active: Sequence[bool]) -> None:
        """Open the record of a sampler step; an open one that was never committed is dropped."""
        self._pending = StepRecord(sigma, tuple(active))

    def commit_step(self) -> None:
        """Keep the open record: the sampler has reported the step."""
        if self._pending is not None:
            self.steps.append(self._pending)
        self._pending = None

    def record(self, index: int, ids: Tensor, grid: Grid, soft: Tensor) -> None:
        """Keep block ``index``: ids (rows,Q), soft (rows,C,Q). Stays on the device until
        :meth:`finish`, so that sampling never waits for a copy."""
        step = self._pending
        if step is None:
            return
        step.ids[index] = ids
        step.grids[index] = grid
        if self.keep_soft:
            step.soft[index] = soft.half()

    def finish(self) -> None:
        """Bring all routes to the CPU, once, after the last step."""
        for step in self.steps:
            step.ids = {index: ids.cpu() for index, ids in step.ids.items()}
            step.soft = {index: soft.cpu() for index, soft in step.soft.items()}

    @property
    def subjects(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def size(self) -> int:
        """Bytes of all recorded maps."""
        maps = [m for step in self.steps for m in (*step.ids.values(), *step.soft.values())]
        return sum(m.numel() * m.element_size() for m in maps)

    @property
    def rows(self) -> int:
        """Number of recorded batch rows."""
        return max((ids.shape[0] for step in self.steps for ids in step.ids.values()), default=0)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of all blocks that were recorded in any step, in forward order."""
        return tuple(sorted({index for step in self.steps for index in step.ids}))

    def block_map(self, step: int, index: int, row: int) -> Tensor | None:
        """Region ids (h,w) uint8 of a block, or None where it was not recorded."""
        self._check(step, row)
        ids = self.steps[step].ids.get(index)
        return None if ids is None else ids[row].reshape(self.steps[step].grids[index])

    def votes(self, row: int) -> Tensor:
        """Share of blocks and steps that gave each token to each candidate: (N+1,h,w) float in
        [0,1] on the finest recorded grid. Coarser blocks vote for all tokens they cover."""
        grids = [grid for step in self.steps for grid in step.grids.values()]
        if not grids:
            raise RoutingError(
                "maps: no routes were recorded; the subjects may have been inactive "
                "(strength 0, or outside start and end)"
            )
        finest = max(grids, key=lambda g: g[0] * g[1])
        # Summed on each grid first: a run of SDXL has thousands of maps on two or three grids.
        ids: dict[Grid, list[Tensor]] = {grid: [] for grid in grids}
        for step, recorded in enumerate(self.steps):
            self._check(step, row)
            for index, grid in recorded.grids.items():
                ids[grid].append(recorded.ids[index][row])
        total = torch.zeros(self.subjects + 1, *finest)
        for grid, rows in ids.items():
            stacked = torch.stack(rows)  # (maps,Q)
            votes = torch.stack([(stacked == i).sum(dim=0) for i in range(self.subjects + 1)])
            drawn = votes.float().reshape(1, -1, *grid)
            total += torch.nn.functional.interpolate(drawn, size=finest, mode="nearest")[0]
        return total / len(grids)

    def consensus(self, row: int) -> Tensor:
        """Region ids (h,w) int64 by majority over blocks and steps, on the finest grid."""
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

    def _check(self, step: int, row: int) -> None:
        if not 0 <= step < len(self.steps):
            raise RoutingError(f"step: got {step}, expected 0 to {len(self.steps) - 1}")
        if not 0 <= row < self.rows:
            raise RoutingError(f"batch_index: got {row}, expected 0 to {self.rows - 1}")
