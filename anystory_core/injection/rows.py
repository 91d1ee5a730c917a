"""Rows of a batch: what each is, and taking, adding and putting back some of them.

Rows lie together in a host's batches, and no list of them becomes a tensor then: on a GPU each such
tensor is a copy that waits for the queue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Which batch rows are conditional and which unconditional; rows in neither stay plain."""

    cond: tuple[int, ...]
    uncond: tuple[int, ...] = ()


def is_range(rows: tuple[int, ...]) -> bool:
    """Whether the rows lie together, in their order."""
    return rows == tuple(range(rows[0], rows[0] + len(rows)))


def take(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Rows of a batch; a view when they lie together."""
    if is_range(rows):
        return x if len(rows) == x.shape[0] else x[rows[0] : rows[0] + len(rows)]
    return x[list(rows)]


def add(x: Tensor, rows: tuple[int, ...], term: Tensor) -> Tensor:
    """x with row i of ``term`` added to row ``rows[i]``; x itself is not written to."""
    if term.dtype != x.dtype:
        term = term.to(x.dtype)
    if len(rows) == x.shape[0]:
        return x + scatter(term, rows)
    if is_range(rows):
        first, last = rows[0], rows[0] + len(rows)
        return torch.cat((x[:first], x[first:last] + term, x[last:]))
    return x.index_add(0, torch.tensor(rows, device=x.device), term)


def scatter(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Row i of x becomes row ``rows[i]`` of the result; ``rows`` is a permutation."""
    if is_range(rows):
        return x
    # Two ranges in turned order, as a host's negative and positive rows: one copy, no index.
    half = rows.index(min(rows))
    if rows[half:] + rows[:half] == tuple(range(len(rows))):
        return torch.cat((x[half:], x[:half]))
    back = sorted(range(len(rows)), key=rows.__getitem__)
    return x[back]
