"""Which subject a place shows, answered by the blocks of a pass together.

A router answers block by block and token by token. In the first steps, when a picture is little but
noise, its answers differ from block to block, a thing that begins to show takes something of every
subject, and one subject often takes all of them. Here a block still answers alone *whether* a token
shows a subject; *which* one follows from the blocks 1...l so far, from the token's surroundings,
and from what the other places say. With m their mean map of N + 1 candidates, on a grid of
:data:`SIDE` tokens along its longer side,

    w   = 1 - m_{N+1}                                 how much of a token is any subject's
    s_i = ln m_i - mean over j <= N of ln m_j
    S_i = G * (w s_i) / G * w  -  clamp(<w s_i> / <w>, -MOST, MOST)
    M_i <- (1 - M_{N+1}) softmax over i of SHARPNESS S_i

G is a Gaussian of deviation :data:`REACH`, <.> the mean over the picture. The last term of S takes
from a subject what it is ahead everywhere: it keeps the places where it is furthest ahead, and
leaves others to the others. What a router is sure of is more than :data:`MOST`, and stays: a
picture, or a tile of one, that shows a single subject is not shared out. One subject changes
nothing. Nothing is kept from one pass to the next. Not in the paper; docs/mini.md has what it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .routes import Grid, SoftMaps, resize_soft

SIDE = 16
REACH = 2.0  # tokens of that grid, an eighth of the picture
SHARPNESS = 8.0
MOST = 1.0
_LEAST_MAP = 1e-4  # before the logarithm
_LEAST = 1e-6  # of what is divided by
_FORBIDDEN = -1e4  # finite: where all are forbidden, shares of nothing are asked for


@dataclass
class Agreement:
    """Of one pass of the U-Net, whose rows each show a whole picture."""

    _sum: Tensor | None = None  # (B,C,Q) of the maps so far
    _grid: Grid = (0, 0)
    _blocks: int = 0

    def settle(self, maps: Tensor, grid: Grid) -> Tensor:
        """A block's maps (B,C,Q) in [0,1] -> its maps by what all blocks so far say, the same
        shape and sum. What the block forbids (0 in its map) stays forbidden."""
        if self._sum is None:
            rows, columns = (max(1, round(SIDE * side / max(grid))) for side in grid)
            self._grid = rows, columns
        seen = resize_soft(SoftMaps(maps, grid), self._grid).maps
        self._sum = seen if self._sum is None else self._sum + seen
        self._blocks += 1
        scores = SoftMaps(_scores(self._sum / self._blocks, self._grid), self._grid)
        subjects = maps[:, :-1]
        scores = resize_soft(scores, grid).maps.masked_fill(subjects <= 0, _FORBIDDEN)
        shares = (SHARPNESS * scores).softmax(dim=1)
        return torch.cat((subjects.sum(dim=1, keepdim=True) * shares, maps[:, -1:]), dim=1)


def _scores(mean: Tensor, grid: Grid) -> Tensor:
    """m (B,N+1,Q) -> S (B,N,Q)."""
    logs = mean[:, :-1].clamp_min(_LEAST_MAP).log()
    ahead = logs - logs.mean(dim=1, keepdim=True)  # s
    weight = 1 - mean[:, -1:]
    weighted = weight * ahead
    near = _blurred(torch.cat((weighted, weight), dim=1), grid)
    near = near[:, :-1] / near[:, -1:].clamp_min(_LEAST)
    covered = weight.sum(dim=2, keepdim=True).clamp_min(_LEAST)
    everywhere = weighted.sum(dim=2, keepdim=True) / covered
    return near - everywhere.clamp(-MOST, MOST)


def _blurred(x: Tensor, grid: Grid) -> Tensor:
    """(B,C,h*w) under the Gaussian; what lies outside of the picture counts 0."""
    down, across = (_gaussian(size, x) for size in grid)
    image = x.reshape(*x.shape[:2], *grid)
    return torch.matmul(torch.matmul(down, image), across).flatten(2)


def _gaussian(size: int, like: Tensor) -> Tensor:
    """(size,size): how much each place counts for each other one."""
    place = torch.arange(size, device=like.device, dtype=like.dtype)
    return torch.exp(-((place[:, None] - place) / REACH).square() / 2)
