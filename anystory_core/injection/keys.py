"""What attention to subjects reads: their keys and values, and the tokens that are theirs.

``route`` (B,Q) is a region id per token: ``i < N`` for subject i, ``N`` for the background. Axes: B
rows, Q image tokens, T subject tokens, D channels, C candidates (N subjects, then the background).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

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
    _joined: KeyValue | None = None

    def __getitem__(self, place: int) -> KeyValue | None:
        return self.parts[place]

    def __iter__(self) -> Iterator[KeyValue | None]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def rows(self) -> int:
        """1, or B where some candidate differs from row to row."""
        return max((p.k.shape[0] for p in self.parts if p is not None), default=1)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each candidate, 0 for None."""
        return tuple(0 if p is None else p.k.shape[1] for p in self.parts)

    def given(self, on: Sequence[bool], like: Tensor) -> list[KeyValue | None]:
        """What the candidates that are ``on`` have, in the dtype and on the device of ``like``."""
        return [
            part.to(like) if part is not None and o else None
            for part, o in zip(self.parts, on, strict=True)
        ]

    def joined(self) -> KeyValue | None:
        """All of them one after the other: (R,T_1+..+T_C,D). The parts become views of it, so that
        nothing is held twice."""
        if self._joined is None and any(self.lengths):
            batch = self.rows
            there = [p.rows(batch) for p in self.parts if p is not None]
            k, v = torch.cat([p.k for p in there], dim=1), torch.cat([p.v for p in there], dim=1)
            self._joined = KeyValue(k, v)
            sizes = self.lengths
            pieces = zip(*(torch.split(x, list(sizes), dim=1) for x in (k, v)), strict=True)
            self.parts = [
                KeyValue(*piece) if size else None
                for piece, size in zip(pieces, sizes, strict=True)
            ]
        return self._joined


@dataclass
class Tables:
    """What masked calls look up by region id. Regions change with every block and step, but a row
    of the bias matrix is the same for all tokens of a region: rows are made once for a run."""

    _made: dict[Any, Tensor] = field(default_factory=dict[Any, Tensor], repr=False)

    def bias(
        self, own: int, lengths: Sequence[int], biases: Sequence[float], like: Tensor
    ) -> Tensor:
        """Eq. 7 and 8 for a token of each region: (C,own+T), 0 on the block's ``own`` keys,
        ``biases[i]`` on candidate i's keys in row i, -inf on all others. A row that would have no
        key at all is 0: it looks anywhere, and its strength is 0."""
        key = own, tuple(lengths), tuple(biases), like.dtype, like.device
        if key not in self._made:
            table = torch.full((len(lengths), own + sum(lengths)), -torch.inf, dtype=torch.float64)
            table[:, :own] = 0
            start = own
            for i, (length, bias) in enumerate(zip(lengths, biases, strict=True)):
                table[i, start : start + length] = bias
                start += length
            table[table.isneginf().all(dim=1)] = 0
            self._made[key] = table.to(like)
        return self._made[key]

    def strengths(self, strengths: Sequence[float], like: Tensor) -> Tensor:
        """(C,1)."""
        key = tuple(strengths), like.dtype, like.device
        if key not in self._made:
            self._made[key] = torch.tensor(strengths, dtype=torch.float64)[:, None].to(like)
        return self._made[key]


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
