"""What attention to subjects reads: their keys and values, and the tokens that are theirs.

``route`` (B,Q) is a region id per token: ``i < N`` for subject i, ``N`` for the background. Axes: B
rows, Q image tokens, T subject tokens, D channels, C candidates (N subjects, then the background).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyValue:
    """Projected keys and values (R,T,D) of one candidate at one block; R is 1 or B."""

    k: Tensor
    v: Tensor

    def row(self, row: int) -> KeyValue:
        """The (1,T,D) slice of a batch row."""
        if self.k.shape[0] == 1:
            return self
        return KeyValue(self.k[row : row + 1], self.v[row : row + 1])

    def rows(self, batch: int) -> KeyValue:
        """Expanded to (batch,T,D)."""
        if self.k.shape[0] == batch:
            return self
        return KeyValue(self.k.expand(batch, -1, -1), self.v.expand(batch, -1, -1))

    def to(self, like: Tensor) -> KeyValue:
        """In the dtype and on the device of ``like``; itself when it is there already."""
        if self.k.dtype == like.dtype and self.k.device == like.device:
            return self
        return KeyValue(self.k.to(like), self.v.to(like))


@dataclass
class Candidates:
    """Keys and values of all C candidates at one block; None: it has none."""

    parts: list[KeyValue | None]
    rows: int = field(init=False)  # 1, or B where some candidate differs from row to row
    lengths: tuple[int, ...] = field(init=False)  # tokens of each candidate, 0 for None
    _joined: KeyValue | None = None
    _expanded: dict[int, KeyValue] = field(default_factory=dict[int, KeyValue])  # by batch

    def __post_init__(self) -> None:
        self.rows = max((p.k.shape[0] for p in self.parts if p is not None), default=1)
        self.lengths = tuple(0 if p is None else p.k.shape[1] for p in self.parts)

    def __getitem__(self, place: int) -> KeyValue | None:
        return self.parts[place]

    def __iter__(self) -> Iterator[KeyValue | None]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def given(self, on: Sequence[bool], like: Tensor) -> list[KeyValue | None]:
        """What the candidates that are ``on`` have, in the dtype and on the device of ``like``."""
        return [
            part.to(like) if part is not None and o else None
            for part, o in zip(self.parts, on, strict=True)
        ]

    def join(self) -> None:
        """Lay all of them out one after the other, (R,T_1+..+T_C,D). The parts become views of it,
        so that nothing is held twice."""
        if self._joined is not None or not any(self.lengths):
            return
        there = [p.rows(self.rows) for p in self.parts if p is not None]
        k, v = torch.cat([p.k for p in there], dim=1), torch.cat([p.v for p in there], dim=1)
        self._joined = KeyValue(k, v)
        pieces = zip(*(torch.split(x, list(self.lengths), dim=1) for x in (k, v)), strict=True)
        self.parts = [
            KeyValue(*piece) if size else None
            for piece, size in zip(pieces, self.lengths, strict=True)
        ]

    def joined(self, batch: int, like: Tensor) -> KeyValue | None:
        """All of them one after the other: (batch,T_1+..+T_C,D), in the dtype and on the device of
        ``like``; None when there is none."""
        self.join()
        if self._joined is None:
            return None
        if torch.compiler.is_compiling():
            return self._joined.rows(batch).to(like)
        if batch not in self._expanded:
            self._expanded[batch] = self._joined.rows(batch)
        return self._expanded[batch].to(like)


def bias_table(
    lengths: tuple[int, ...], biases: tuple[float, ...], like: Tensor, *, alone: bool = False
) -> Tensor:
    """Eq. 7 and 8 for a token of each region, what masked calls look up by region id: (C,T),
    ``biases[i]`` on candidate i's keys in row i, -inf on all others. Regions change with every
    block and step, but a row of the bias matrix is the same for all tokens of a region. ``alone``:
    there are no other keys; a row that would have none is then 0: it looks anywhere, and its
    strength is 0."""
    return _bias_table(lengths, biases, alone, like.dtype, like.device)


def strength_table(strengths: tuple[float, ...], like: Tensor) -> Tensor:
    """(C,1): eta of a token of each region."""
    return _strength_table(strengths, like.dtype, like.device)


Table = TypeVar("Table", bound=Callable[..., Tensor])


def _made_once(make: Table) -> Table:
    """Made once for its arguments; in a compiled model a part of the graph."""

    @lru_cache(64)
    def made(*arguments: Any) -> Tensor:
        with torch.inference_mode(False):  # or no training step could use it
            return make(*arguments)

    def table(*arguments: Any) -> Tensor:
        # Results that are assumed constant would all be called after this function, and AOTAutograd
        # takes each name once.
        return (make if torch.compiler.is_compiling() else made)(*arguments)

    return cast(Table, table)


@_made_once
def _bias_table(
    lengths: tuple[int, ...],
    biases: tuple[float, ...],
    alone: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    table = torch.full((len(lengths), sum(lengths)), -math.inf, dtype=dtype, device=device)
    start = 0
    for i, (length, bias) in enumerate(zip(lengths, biases, strict=True)):
        if alone and (not length or bias == -math.inf):
            table[i] = 0
        else:
            table[i, start : start + length] = bias
        start += length
    return table


@_made_once
def _strength_table(
    strengths: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.tensor(strengths, dtype=dtype, device=device)[:, None]


@dataclass(frozen=True)
class Regions:
    """Tokens of each row sorted by region, with the sizes known to the host."""

    order: Tensor  # (B,Q): token numbers, region by region
    inverse: Tensor  # (B,Q): position of each token in ``order``
    sizes: tuple[tuple[int, ...], ...]  # [row][candidate]

    @classmethod
    def of(cls, route: Tensor, candidates: int) -> Regions:
        """Sort ``route`` (B,Q). Reads the sizes back to the host: one synchronisation."""
        order = route.argsort(dim=1, stable=True)
        inverse = torch.empty_like(order)
        places = torch.arange(order.shape[1], device=order.device)
        inverse.scatter_(1, order, places.expand_as(order))
        sizes = torch.zeros(
            route.shape[0], candidates, dtype=torch.long, device=route.device
        ).scatter_add_(1, route.long(), torch.ones_like(route, dtype=torch.long))
        rows = cast("list[list[int]]", cast(Any, sizes).tolist())
        return cls(order, inverse, tuple(tuple(row) for row in rows))

    def sort(self, x: Tensor, row: int, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """(B,Q,D) -> the tokens of a row as one (1,n,D) piece per region."""
        ordered = x[row].index_select(0, self.order[row])[None]
        return torch.split(ordered, list(sizes), dim=1)

    def unsort(self, pieces: Sequence[Tensor], row: int) -> Tensor:
        """Undo :meth:`sort` on the pieces (1,n,D) of a row -> (Q,D)."""
        return torch.cat(tuple(pieces), dim=1)[0].index_select(0, self.inverse[row])
