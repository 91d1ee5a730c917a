"""Routed injection of the subjects (paper Eq. 5-8) as functions on tensors.

``route`` (B,Q) is a region id per token: ``i < N`` for subject i, ``N`` for the background.
``None`` stands for a candidate that contributes nothing (a subject outside its window, or at
strength 0).

Each equation has several exact ways of computation, and a test holds them to each other:

- *by region*: tokens are sorted by region, each region attends to its own keys only. Operations do
  not grow with N, but the sizes of the regions must be known to the host, and every row and region
  is a call of its own: the way for long rows on a CPU.
- *masked*: one call over all keys with an attention mask. Nothing leaves the device: the way on a
  GPU, and for short rows.
- *dense* (Eq. 5 only): every candidate over every token, weighted; the way that has a gradient with
  respect to the weights, for training.

Axes: B rows, Q image tokens, T subject tokens, G reference tokens, D channels, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor


class Attention(Protocol):
    """Dense attention over (B,Q,D), (B,K,D), (B,K,D) with D split into heads -> (B,Q,D).

    ``mask`` is additive and broadcasts to (B,Q,K)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
    ) -> Tensor: ...


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


def clip_by_region(
    q: Tensor,
    conditions: Sequence[KeyValue | None],
    strengths: Sequence[float],
    regions: Regions,
    heads: int,
    attention: Attention,
) -> Tensor:
    """Second term of Eq. 5, ``eta_i sigma_i * Attn(Q, K_i, V_i)`` summed over i: q -> (B,Q,D)."""
    rows: list[Tensor] = []
    for row, sizes in enumerate(regions.sizes):
        tokens = regions.sort(q, row, sizes)
        pieces: list[Tensor] = []
        for piece, condition, strength in zip(tokens, conditions, strengths, strict=True):
            if piece.shape[1] == 0:
                continue
            if condition is None or strength == 0:
                pieces.append(torch.zeros_like(piece))
                continue
            kv = condition.row(row)
            out = attention(piece, kv.k, kv.v, heads)
            pieces.append(out if strength == 1 else out * strength)
        rows.append(regions.unsort(pieces, row))
    return torch.stack(rows)


def clip_masked(
    q: Tensor,
    conditions: Candidates,
    strengths: Sequence[float],
    route: Tensor,
    heads: int,
    attention: Attention,
    tables: Tables,
) -> Tensor:
    """As :func:`clip_by_region` in one call: keys of all candidates, masked by region."""
    kv = conditions.joined()
    if kv is None:
        return torch.zeros_like(q)
    kv = kv.to(q).rows(q.shape[0])
    lengths = conditions.lengths
    eta = tuple(s if length else 0.0 for s, length in zip(strengths, lengths, strict=True))
    mask = tables.bias(0, lengths, [0.0 if s else -math.inf for s in eta], q)[route]
    out = attention(q, kv.k, kv.v, heads, mask)
    return out if all(s == 1 for s in eta) else out * tables.strengths(eta, q)[route]


def clip_dense(
    q: Tensor,
    conditions: Sequence[KeyValue | None],
    strengths: Sequence[float],
    weights: Tensor,
    heads: int,
    attention: Attention,
) -> Tensor:
    """Second term of Eq. 5 for real-valued ``weights`` (B,C,Q); differentiable in them."""
    out = torch.zeros_like(q)
    for i, (condition, strength) in enumerate(zip(conditions, strengths, strict=True)):
        if condition is None or strength == 0:
            continue
        kv = condition.rows(q.shape[0])
        term = attention(q, kv.k, kv.v, heads)
        out = out + strength * weights[:, i, :, None].to(q.dtype) * term
    return out


def clip_everywhere(
    q: Tensor, condition: KeyValue | None, strength: float, heads: int, attention: Attention
) -> Tensor:
    """Eq. 5 with one candidate for all tokens, as for unconditional rows."""
    if condition is None or strength == 0:
        return torch.zeros_like(q)
    kv = condition.rows(q.shape[0])
    out = attention(q, kv.k, kv.v, heads)
    return out if strength == 1 else out * strength


def reference_by_region(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    references: Sequence[KeyValue | None],
    biases: Sequence[float],
    regions: Regions,
    heads: int,
    attention: Attention,
) -> Tensor:
    """Eq. 6-8: region i attends to [K, K_i] with ``biases[i]`` (gamma_i) on the reference logits;
    tokens of a candidate without reference attend to K alone. q, k, v (B,Q,D) -> (B,Q,D)."""
    rows: list[Tensor] = []
    for row, sizes in enumerate(regions.sizes):
        tokens = regions.sort(q, row, sizes)
        own = KeyValue(k[row : row + 1], v[row : row + 1])
        given = {
            i: r.row(row)
            for i, (size, r) in enumerate(zip(sizes, references, strict=True))
            if size and r is not None
        }
        there = list(given)
        keys: dict[int, tuple[KeyValue, tuple[int, int]]] = {}
        # Two regions share one copy of the own keys, with a reference on either side of them.
        for first, second in zip(there[::2], [*there[1::2], None], strict=False):
            keys |= _between(own, given, first, second)
        pieces: list[Tensor] = []
        for i, (piece, bias) in enumerate(zip(tokens, biases, strict=True)):
            if piece.shape[1] == 0:
                continue
            kv, (before, after) = keys.get(i, (own, (0, 0)))
            mask = None
            if bias != 0 and before + after:
                mask = _bias_row(piece, before, k.shape[1], after, bias)
            pieces.append(attention(piece, kv.k, kv.v, heads, mask))
        rows.append(regions.unsort(pieces, row))
    return torch.stack(rows)


def _between(
    own: KeyValue, given: Mapping[int, KeyValue], first: int, second: int | None
) -> dict[int, tuple[KeyValue, tuple[int, int]]]:
    """[reference, own, reference] in one tensor: for each of the two regions the part that is
    its, and how many reference keys stand before and after the own ones."""
    parts = [given[first], own, *([] if second is None else [given[second]])]
    k, v = torch.cat([p.k for p in parts], dim=1), torch.cat([p.v for p in parts], dim=1)
    before, middle = given[first].k.shape[1], own.k.shape[1]
    out = {first: (KeyValue(k[:, : before + middle], v[:, : before + middle]), (before, 0))}
    if second is not None:
        out[second] = (KeyValue(k[:, before:], v[:, before:]), (0, given[second].k.shape[1]))
    return out


def reference_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    references: Candidates,
    biases: Sequence[float],
    route: Tensor,
    heads: int,
    attention: Attention,
    tables: Tables,
) -> Tensor:
    """As :func:`reference_by_region` in one call with the bias matrix of Eq. 7. A bias of -inf
    closes a candidate's keys to its own region too."""
    kv = references.joined()
    if kv is None:
        return attention(q, k, v, heads)
    kv = kv.to(q).rows(q.shape[0])
    keys, values = torch.cat((k, kv.k), dim=1), torch.cat((v, kv.v), dim=1)
    mask = tables.bias(k.shape[1], references.lengths, biases, q)[route]
    return attention(q, keys, values, heads, mask)


def _bias_row(q: Tensor, before: int, own: int, after: int, bias: float) -> Tensor:
    """(1,Q,before+own+after): gamma on the reference keys, the same for every token."""
    parts = (q.new_full((before,), bias), q.new_zeros(own), q.new_full((after,), bias))
    return torch.cat(parts).expand(1, q.shape[1], -1)
