"""Which subject a place shows, answered by the blocks of a pass together.

A router answers block by block and token by token. In the first steps, when a picture is little but
noise, the thing that begins to show takes something of every subject, and often one that is only a
little ahead takes every place. Here a block still answers alone how much of a token is any
subject's; whose it is follows from all blocks up to it, from the token's surroundings, and from
what the other places say. With m the mean map of those blocks, on a grid of :data:`SIDE` tokens
along its longer side, and over the N subjects i

    w    = 1 - m_{N+1}                             how much of a token is any subject's
    a_i  = <w ln m_i> / <w>                        how far i is ahead, <.>: mean over the picture
    S_i  = G * (w ln m_i) / G * w  +  min(max_j a_j - a_i, MOST)
    M_i <- (1 - M_{N+1}) softmax over i of SHARPNESS S_i

G is a Gaussian of deviation :data:`REACH`. The last term of S gives the others what one is ahead by
everywhere: that one keeps the places where it is furthest ahead. A router that is surer than
:data:`MOST`, a factor of 7, is not overruled: a tile of a finished picture that shows one subject
is not shared out. A token that is left to one candidate (the others have 0 there) is no evidence.

One subject alone has nobody to agree with. But where it will be is not decided either while a
picture is little but noise, and a router that must answer gives it all places that it might take:
side by side, and it is drawn in each. So in the first :data:`BLANK` of the schedule a subject that
acts alone has every place, as in stage 1 of the training; then the router is asked.

Nothing is kept from one pass to the next. Not in the paper; docs/mini.md has what it does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .grids import Grid, area_shares, product

SIDE = 16
REACH = 2.0  # tokens of that grid, an eighth of the picture
SHARPNESS = 8.0
MOST = 2.0
BLANK = 0.15
_LEAST_MAP = 1e-4  # before the logarithm
_LEAST = 1e-6  # of what is divided by
_FORBIDDEN = -1e4  # finite: where all are forbidden, shares of nothing are asked for


@dataclass
class Agreement:
    """Of one pass of the U-Net, whose rows each show a whole picture."""

    _seen: dict[int, Tensor] = field(default_factory=dict[int, Tensor])  # (B,C,h,w) by block
    _grid: Grid = (0, 0)
    _reach: tuple[Tensor, ...] = ()  # of the grid's rows and columns
    _ways: dict[Grid, tuple[Tensor, ...]] = field(default_factory=dict[Grid, tuple[Tensor, ...]])

    def settle(self, index: int, maps: Tensor, grid: Grid) -> Tensor:
        """Maps (B,C,Q) in [0,1] of block ``index`` -> its maps by what all blocks up to it say, the
        same shape and sum. What the block forbids (0 in its map) stays forbidden. A block that runs
        again gets the same answer."""
        if not self._seen:
            rows, columns = (max(1, round(SIDE * side / max(grid))) for side in grid)
            self._grid = rows, columns
            self._reach = tuple(_gaussian(size, maps) for size in self._grid)
        self._seen[index] = self._gathered(maps.reshape(*maps.shape[:2], *grid), grid)
        mean = torch.stack([seen for block, seen in self._seen.items() if block <= index]).mean(0)
        scores = torch.nn.functional.interpolate(self._scores(mean), size=grid, mode="bilinear")
        subjects = maps[:, :-1]
        scores = scores.flatten(2).masked_fill(subjects <= 0, _FORBIDDEN)
        shares = (SHARPNESS * scores).softmax(dim=1)
        return torch.cat((subjects.sum(dim=1, keepdim=True) * shares, maps[:, -1:]), dim=1)

    def _gathered(self, image: Tensor, grid: Grid) -> Tensor:
        """(B,C,*grid) on the common grid, each place the mean of what it covers. Products of
        matrices, because not every device averages over areas that do not divide."""
        if grid not in self._ways:
            sizes = zip(grid, self._grid, strict=True)
            self._ways[grid] = tuple(area_shares(before, after, image) for before, after in sizes)
        return product(self._ways[grid][0], image, self._ways[grid][1].t())

    def _scores(self, mean: Tensor) -> Tensor:
        """m (B,N+1,h,w) -> S (B,N,h,w)."""
        subjects = mean[:, :-1]
        open_ = (subjects > 0).sum(dim=1, keepdim=True) > 1
        weight = (1 - mean[:, -1:]) * open_
        parts = torch.cat((weight * subjects.clamp_min(_LEAST_MAP).log(), weight), dim=1)
        near = product(self._reach[0], parts, self._reach[1])
        whole = parts.sum(dim=(2, 3), keepdim=True)
        near, ahead = (x[:, :-1] / x[:, -1:].clamp_min(_LEAST) for x in (near, whole))
        return near + (ahead.amax(dim=1, keepdim=True) - ahead).clamp_max(MOST)


@dataclass(frozen=True)
class Alone:
    """Of one pass that shows little but noise, in which only ``subject`` acts."""

    subject: int

    def settle(self, index: int, maps: Tensor, grid: Grid) -> Tensor:
        """Maps of the shape of ``maps`` (B,C,Q) by which the subject has every place."""
        whole = torch.zeros_like(maps)
        whole[:, self.subject] = 1
        return whole


def _gaussian(size: int, like: Tensor) -> Tensor:
    """(size,size): how much each place counts for each other one."""
    place = torch.arange(size, device=like.device, dtype=like.dtype)
    return torch.exp(-((place[:, None] - place) / REACH).square() / 2)
