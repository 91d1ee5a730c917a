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

from collections.abc import Sequence
from dataclasses import dataclass
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
        return KeyValue(self.k.expand(batch, -1, -1), self.v.expand(batch, -1, -1))

    def to(self, like: Tensor) -> KeyValue:
        """In the dtype and on the device of ``like``; itself when it is there already."""
        return KeyValue(self.k.to(like), self.v.to(like))


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

    def head(self, rows: int) -> Regions:
        """Only the first rows."""
        if rows == len(self.sizes):
            return self
        return Regions(self.order[:rows], self.inverse[:rows], self.sizes[:rows])

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
    conditions: Sequence[KeyValue | None],
    strengths: Sequence[float],
    route: Tensor,
    heads: int,
    attention: Attention,
) -> Tensor:
    """As :func:`clip_by_region` in one call: keys of all candidates, masked by region."""
    batch = q.shape[0]
    present = [(i, c.rows(batch)) for i, c in enumerate(conditions) if c is not None]
    if not present:
        return torch.zeros_like(q)
    owner = torch.cat([torch.full((c.k.shape[1],), i, device=q.device) for i, c in present])
    foreign = route[:, :, None] != owner  # (B,Q,K)
    if len(present) < len(conditions):
        # A token of a region without keys may look anywhere: its strength below is zero.
        foreign = foreign & ~foreign.all(dim=-1, keepdim=True)
    mask = torch.zeros_like(foreign, dtype=q.dtype).masked_fill_(foreign, -torch.inf)
    k = torch.cat([c.k for _, c in present], dim=1)
    v = torch.cat([c.v for _, c in present], dim=1)
    out = attention(q, k, v, heads, mask)
    eta = [s if c is not None else 0.0 for s, c in zip(strengths, conditions, strict=True)]
    if all(s == 1 for s in eta):
        return out
    return out * torch.tensor(eta, dtype=q.dtype, device=q.device)[route.long()][..., None]


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
        own_k, own_v = k[row : row + 1], v[row : row + 1]
        pieces: list[Tensor] = []
        for piece, reference, bias in zip(tokens, references, biases, strict=True):
            if piece.shape[1] == 0:
                continue
            if reference is None:
                pieces.append(attention(piece, own_k, own_v, heads))
                continue
            kv = reference.row(row)
            keys, values = torch.cat((own_k, kv.k), dim=1), torch.cat((own_v, kv.v), dim=1)
            mask = None if bias == 0 else _bias_row(piece, own_k.shape[1], kv.k.shape[1], bias)
            pieces.append(attention(piece, keys, values, heads, mask))
        rows.append(regions.unsort(pieces, row))
    return torch.stack(rows)


def reference_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    references: Sequence[KeyValue | None],
    biases: Sequence[float],
    route: Tensor,
    heads: int,
    attention: Attention,
) -> Tensor:
    """As :func:`reference_by_region` in one call with the bias matrix of Eq. 7."""
    batch, tokens, _ = q.shape
    present = [
        (i, r.rows(batch), b)
        for i, (r, b) in enumerate(zip(references, biases, strict=True))
        if r is not None
    ]
    if not present:
        return attention(q, k, v, heads)
    bias = [q.new_zeros(batch, tokens, k.shape[1])]
    for i, reference, gamma in present:
        outside = (route != i)[..., None]  # (B,Q,1); Eq. 8
        block = q.new_full((batch, tokens, 1), gamma).masked_fill(outside, -torch.inf)
        bias.append(block.expand(-1, -1, reference.k.shape[1]))
    keys = torch.cat([k, *(r.k for _, r, _ in present)], dim=1)
    values = torch.cat([v, *(r.v for _, r, _ in present)], dim=1)
    return attention(q, keys, values, heads, torch.cat(bias, dim=-1))


def _bias_row(q: Tensor, own: int, reference: int, bias: float) -> Tensor:
    """(1,Q,own+reference): gamma on the reference keys, the same for every token."""
    row = torch.cat((q.new_zeros(own), q.new_full((reference,), bias)))
    return row.expand(1, q.shape[1], -1)
