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
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .keys import Candidates, KeyValue, Regions, bias_table, strength_table


class Attend(Protocol):
    """Dense attention of one block: (B,Q,D), (B,K,D), (B,K,D) -> (B,Q,D), split into its heads.

    ``mask`` is additive and broadcasts to (B,Q,K)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None
    ) -> Tensor: ...


def clip_by_region(
    q: Tensor,
    conditions: Sequence[KeyValue | None],
    strengths: Sequence[float],
    regions: Regions,
    attend: Attend,
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
            out = attend(piece, kv.k, kv.v)
            pieces.append(out if strength == 1 else out * strength)
        rows.append(regions.unsort(pieces, row))
    return torch.stack(rows)


def clip_masked(
    q: Tensor,
    conditions: Candidates,
    strengths: Sequence[float],
    route: Tensor,
    attend: Attend,
) -> Tensor:
    """As :func:`clip_by_region` in one call: keys of all candidates, masked by region."""
    kv = conditions.joined(q.shape[0], q)
    if kv is None:
        return torch.zeros_like(q)
    lengths = conditions.lengths
    eta = tuple(s if length else 0.0 for s, length in zip(strengths, lengths, strict=True))
    open_ = tuple(0.0 if s else -math.inf for s in eta)
    mask = bias_table(lengths, open_, q, alone=True)[route]
    out = attend(q, kv.k, kv.v, mask=mask)
    if all(s == 1 for s in eta):
        return out
    return out * strength_table(eta, q)[route]


def clip_dense(
    q: Tensor,
    conditions: Sequence[KeyValue | None],
    strengths: Sequence[float],
    weights: Tensor,
    attend: Attend,
) -> Tensor:
    """Second term of Eq. 5 for real-valued ``weights`` (B,C,Q); differentiable in them."""
    out = torch.zeros_like(q)
    for i, (condition, strength) in enumerate(zip(conditions, strengths, strict=True)):
        if condition is None or strength == 0:
            continue
        kv = condition.rows(q.shape[0])
        term = attend(q, kv.k, kv.v)
        out = out + strength * weights[:, i, :, None].to(q.dtype) * term
    return out


def clip_everywhere(
    q: Tensor, condition: KeyValue | None, strength: float, attend: Attend
) -> Tensor:
    """Eq. 5 with one candidate for all tokens, as for unconditional rows."""
    if condition is None or strength == 0:
        return torch.zeros_like(q)
    kv = condition.rows(q.shape[0])
    out = attend(q, kv.k, kv.v)
    return out if strength == 1 else out * strength


def text_gate(text: Tensor, weight: Tensor) -> Tensor:
    """MIP-Adapter's gate of the second term of Eq. 5: ``sigmoid(T_u . w)``, over its mean over the
    tokens u. text (B,Q,D) is the text attention's output, weight (1,D) -> (B,Q,1), float32 or
    wider."""
    wide = torch.promote_types(text.dtype, torch.float32)
    gate = torch.sigmoid((text @ weight.to(text).t()).to(wide))
    return gate / gate.mean(dim=1, keepdim=True)


def reference_by_region(
    q: Tensor,
    own: KeyValue,
    references: Sequence[KeyValue | None],
    biases: Sequence[float],
    regions: Regions,
    attend: Attend,
) -> Tensor:
    """Eq. 6-8: region i attends to [K, K_i] with ``biases[i]`` (gamma_i) on the reference logits;
    tokens of a candidate without reference attend to K alone. q (B,Q,D), ``own`` the block's K and
    V (B,Q,D) -> (B,Q,D)."""
    rows: list[Tensor] = []
    for row, sizes in enumerate(regions.sizes):
        tokens = regions.sort(q, row, sizes)
        mine = own.row(row)
        given = {
            i: r.row(row)
            for i, (size, r) in enumerate(zip(sizes, references, strict=True))
            if size and r is not None
        }
        there = list(given)
        keys: dict[int, tuple[KeyValue, tuple[int, int]]] = {}
        # Two regions share one copy of the own keys, with a reference on either side of them.
        for first, second in zip(there[::2], [*there[1::2], None], strict=False):
            keys |= _between(mine, given, first, second)
        pieces: list[Tensor] = []
        for i, (piece, bias) in enumerate(zip(tokens, biases, strict=True)):
            if piece.shape[1] == 0:
                continue
            kv, (before, after) = keys.get(i, (mine, (0, 0)))
            mask = None
            if bias != 0 and before + after:
                mask = _bias_row(piece, before, own.k.shape[1], after, bias)
            pieces.append(attend(piece, kv.k, kv.v, mask=mask))
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
    own: KeyValue,
    references: Candidates,
    biases: Sequence[float],
    route: Tensor,
    attend: Attend,
) -> Tensor:
    """As :func:`reference_by_region` in one call with the bias matrix of Eq. 7. A bias of -inf
    closes a candidate's keys to its own region too."""
    kv = references.joined(q.shape[0], q)
    if kv is None:
        return attend(q, own.k, own.v)
    keys, values = torch.cat((own.k, kv.k), dim=1), torch.cat((own.v, kv.v), dim=1)
    given = bias_table(references.lengths, tuple(biases), q)[route]
    mask = torch.nn.functional.pad(given, (own.k.shape[1], 0))
    return attend(q, keys, values, mask=mask)


def _bias_row(q: Tensor, before: int, own: int, after: int, bias: float) -> Tensor:
    """(1,Q,before+own+after): gamma on the reference keys, the same for every token."""
    parts = (q.new_full((before,), bias), q.new_zeros(own), q.new_full((after,), bias))
    return torch.cat(parts).expand(1, q.shape[1], -1)
