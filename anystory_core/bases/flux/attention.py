"""Attention of a block's main sequence [text | subjects' tokens | image] with references.

    text and subject tokens   look at everything: text, all subjects' tokens, image, all references
    image tokens of subject i look at text, subject i's tokens, image, subject i's references
    image tokens of nobody    look at text and image

and logits of subject i's references get ``+ gamma_i``. Without a route every query looks at
everything. The exact ways:

- *open*: no route; one call without a mask (with one row of biases where some gamma is not 0).
- *by region*: text and subject tokens in one call, then for each row and region a call over its own
  keys. Operations do not grow with the number of subjects, no call has a mask, but the sizes of the
  regions must be known to the host.
- *masked*: one call over all keys with a mask of queries x keys; also where the caller has a mask.

A row that takes no part looks at text and image as if the subjects' tokens were not there.

A subject's tokens for places outside of its mask are all zero. They enter the text stream as one
vector at one position, so they stay the same through every block: one of them goes through the
layers, and as a key it counts as often as there are such places.

Axes: B rows, H heads, L tokens of the sequence, M image tokens, K keys, h width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .host import HeadAttention
from .reference import HeadKeys

Grid = tuple[int, int]  # height and width in tokens


@dataclass(frozen=True)
class Layout:
    """Where what is in the sequence: ``text`` tokens, ``concepts[i]`` tokens of subject i (0: it
    has none at this call), then the image. ``repeats[i]``: as a key, the last token of subject i
    counts so many times more; nothing: none does."""

    text: int
    concepts: tuple[int, ...]
    grid: Grid
    repeats: tuple[int, ...] = ()

    @property
    def image(self) -> int:
        """M."""
        return self.grid[0] * self.grid[1]

    @property
    def start(self) -> int:
        """Number of the first image token."""
        return self.text + sum(self.concepts)

    @property
    def total(self) -> int:
        """L."""
        return self.start + self.image

    def again(self, subject: int) -> int:
        """How many times more the last token of a subject counts as a key."""
        return self.repeats[subject] if self.repeats else 0

    def spans(self) -> Iterator[tuple[int, int]]:
        """First and last + 1 token of each subject."""
        start = self.text
        for length in self.concepts:
            yield start, start + length
            start += length


@dataclass(frozen=True)
class Given:
    """What the subjects have at one block: references and their biases (gamma); None: nothing."""

    references: tuple[HeadKeys | None, ...]
    biases: tuple[float, ...]

    @classmethod
    def of(cls, references: Sequence[HeadKeys | None], biases: Sequence[float]) -> Given:
        """A bias of -inf takes the references away."""
        kept = [r if b > -math.inf else None for r, b in zip(references, biases, strict=True)]
        return cls(tuple(kept), tuple(biases))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Reference tokens of each subject."""
        return tuple(0 if r is None else r.tokens for r in self.references)

    @property
    def biased(self) -> bool:
        """Whether some reference has a gamma other than 0."""
        pairs = zip(self.references, self.biases, strict=True)
        return any(r is not None and bias != 0 for r, bias in pairs)

    def columns(self, like: Tensor, layout: Layout) -> Tensor:
        """gamma of all keys that :meth:`joined` gives: (K,)."""
        start = layout.total
        row = like.new_zeros(start + sum(self.lengths) + sum(layout.repeats))
        for length, bias in zip(self.lengths, self.biases, strict=True):
            if length:
                row[start : start + length] = bias
            start += length
        return row

    def joined(self, x: Tensor, layout: Layout, *, values: bool) -> Tensor:
        """The sequence's keys or values x (B,H,L,h) with all references behind them, and behind
        those the tokens that count more than once."""
        own = [r.rows(x.shape[0]) for r in self.references if r is not None]
        parts = [x, *(r.v if values else r.k for r in own)]
        for subject, (_, end) in enumerate(layout.spans()):
            if layout.again(subject):
                parts.append(_again(x, end, layout.again(subject)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _again(x: Tensor, end: int, count: int) -> Tensor:
    """Copies of the token before ``end``: (B,H,count,h)."""
    return x[:, :, end - 1 : end].expand(-1, -1, count, -1)


def attend_open(
    q: Tensor, k: Tensor, v: Tensor, given: Given, layout: Layout, attention: HeadAttention
) -> Tensor:
    """q (B,H,Q,h) over k, v (B,H,L,h) and all references -> (B,Q,H*h)."""
    keys = given.joined(k, layout, values=False)
    values = given.joined(v, layout, values=True)
    if not given.biased:
        return attention(q, keys, values)
    row = given.columns(q, layout)
    return attention(q, keys, values, row.expand(1, 1, q.shape[2], -1))


def attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    attention: HeadAttention,
    mask: Tensor | None = None,
) -> Tensor:
    """Rows that take no part; what the subjects' tokens themselves get there is read by nobody.
    mask: of all L keys."""
    if layout.start > layout.text:
        k, v = (without_concepts(x, 2, layout) for x in (k, v))
        mask = None if mask is None else without_concepts(mask, mask.ndim - 1, layout)
    return attention(q, k, v) if mask is None else attention(q, k, v, mask)


def without_concepts(x: Tensor, dim: int, layout: Layout) -> Tensor:
    """x without the subjects' tokens, which stand between text and image on ``dim``."""
    before = x.narrow(dim, 0, layout.text)
    return torch.cat((before, x.narrow(dim, layout.start, layout.image)), dim=dim)


def attend_by_region(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Given,
    ids: Tensor,
    layout: Layout,
    attention: HeadAttention,
) -> Tensor:
    """q, k, v (B,H,L,h), ids (B,M) region of each image token (N: nobody) -> (B,L,H*h).

    Two subjects share one copy of the sequence's keys, with what is theirs on either side of it:
    [references a, tokens a, text, image, tokens b, references b]. All of it is what text looks at.
    """
    subjects = len(layout.concepts)
    copies = [
        _Copy.of(k, v, given, layout, first, first + 1 if first + 1 < subjects else None)
        for first in range(0, subjects, 2)
    ]
    head = q[:, :, : layout.start]
    if len(copies) == 1:
        text = copies[0].everything(head, given, attention)
    else:
        text = attend_open(head, k, v, given, layout, attention)
    order = ids.argsort(dim=1, stable=True)
    inverse = order.argsort(dim=1)
    sizes = _sizes(ids, subjects + 1)
    images: list[Tensor] = []
    for row, counts in enumerate(sizes):
        image = q[row : row + 1, :, layout.start :].index_select(2, order[row])
        pieces: list[Tensor] = []
        for region, piece in enumerate(torch.split(image, counts, dim=2)):
            if piece.shape[2] == 0:
                continue
            copy = copies[min(region // 2, len(copies) - 1)]
            pieces.append(copy.region(piece, region, row, given, attention))
        images.append(torch.cat(pieces, dim=1).index_select(1, inverse[row]))
    return torch.cat((text, torch.cat(images)), dim=1)


def _sizes(ids: Tensor, regions: int) -> list[list[int]]:
    """Tokens of each region in each row: one read-back for all rows."""
    numbers = torch.arange(regions, device=ids.device)
    counts = (ids[:, None] == numbers[:, None]).sum(dim=2)  # (B,regions)
    return cast("list[list[int]]", cast(Any, counts).tolist())


@dataclass(frozen=True)
class _Copy:
    """Keys and values of the sequence between those of one or two subjects."""

    k: Tensor
    v: Tensor
    spans: dict[int, tuple[int, int]]  # subject -> its part of the keys; -1: text and image
    references: dict[int, tuple[int, int]]  # subject -> its references' part

    @classmethod
    def of(
        cls, k: Tensor, v: Tensor, given: Given, layout: Layout, first: int, second: int | None
    ) -> _Copy:
        batch = k.shape[0]
        spans = list(layout.spans())

        def theirs(x: Tensor, subject: int, values: bool) -> list[Tensor]:
            start, end = spans[subject]
            own = [x[:, :, start:end]]
            if layout.again(subject):
                own.append(_again(x, end, layout.again(subject)))
            reference = given.references[subject]
            if reference is not None:
                rows = reference.rows(batch)
                own.insert(0, rows.v if values else rows.k)
            return own

        def join(x: Tensor, values: bool) -> Tensor:
            middle = [x[:, :, : layout.text], x[:, :, layout.start :]]
            after = [] if second is None else theirs(x, second, values)[::-1]
            return torch.cat((*theirs(x, first, values), *middle, *after), dim=2)

        lengths = given.lengths
        before = lengths[first] + layout.concepts[first] + layout.again(first)
        middle = before + layout.text + layout.image
        parts = {-1: (before, middle), first: (0, middle)}
        references = {first: (0, lengths[first])}
        if second is not None:
            end = middle + layout.concepts[second] + layout.again(second) + lengths[second]
            parts[second] = before, end
            references[second] = end - lengths[second], end
        return cls(join(k, False), join(v, True), parts, references)

    def everything(self, q: Tensor, given: Given, attention: HeadAttention) -> Tensor:
        """All rows of q over all keys."""
        mask = self._mask(q, (0, self.k.shape[2]), list(self.references), given)
        return _call(attention, q, self.k, self.v, mask)

    def region(
        self, q: Tensor, region: int, row: int, given: Given, attention: HeadAttention
    ) -> Tensor:
        """Tokens q (1,H,n,h) of one row and region."""
        owner = region if region in self.references else -1
        start, end = self.spans[owner]
        mask = self._mask(q, (start, end), [region] if owner == region else [], given)
        k, v = (x[row : row + 1, :, start:end] for x in (self.k, self.v))
        return _call(attention, q, k, v, mask)

    def _mask(
        self, q: Tensor, part: tuple[int, int], subjects: Sequence[int], given: Given
    ) -> Tensor | None:
        """gamma on the references of these subjects, the same for every query; None: all are 0."""
        there = [s for s in subjects if given.references[s] is not None and given.biases[s] != 0]
        if not there:
            return None
        row = q.new_zeros(part[1] - part[0])
        for subject in there:
            first, last = self.references[subject]
            row[first - part[0] : last - part[0]] = given.biases[subject]
        return row.expand(1, 1, q.shape[2], -1)


def _call(attention: HeadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return attention(q, k, v) if mask is None else attention(q, k, v, mask)


def attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Given,
    ids: Tensor | None,
    layout: Layout,
    attention: HeadAttention,
    mask: Tensor | None = None,
) -> Tensor:
    """As :func:`attend_by_region` (ids None: as :func:`attend_open`) in one call over all keys.
    mask (B or 1,1 or H,L,L): the caller's own over the sequence, additive or bool."""
    keys = given.joined(k, layout, values=False)
    values = given.joined(v, layout, values=True)
    allowed = _allowed(given, ids, layout, q.device)  # (B or 1,1,L,K) bool
    if mask is None and not given.biased:
        return attention(q, keys, values, allowed)
    bias = q.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
    bias += given.columns(q, layout)
    if mask is not None:
        own = additive(mask, q)
        bias = bias + torch.nn.functional.pad(own, (0, keys.shape[2] - k.shape[2]))
    return attention(q, keys, values, bias)


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask (L,L), (B,L,L) or (B,H,L,L), bool or additive, as additive (B or 1,H or 1,L,L)."""
    if mask.dtype == torch.bool:
        mask = like.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    if mask.ndim == 2:
        mask = mask[None]
    return (mask[:, None] if mask.ndim == 3 else mask).to(like)


def _allowed(given: Given, ids: Tensor | None, layout: Layout, device: torch.device) -> Tensor:
    """Which keys each query of the sequence may look at: (B or 1,1,L,K) bool."""
    keys = layout.total + sum(given.lengths) + sum(layout.repeats)
    if ids is None:
        return torch.ones(1, 1, layout.total, keys, dtype=torch.bool, device=device)
    table = torch.zeros(len(layout.concepts) + 1, keys, dtype=torch.bool)
    table[:, : layout.text] = True
    table[:, layout.start : layout.total] = True
    position = layout.total
    for subject, ((first, last), length) in enumerate(
        zip(layout.spans(), given.lengths, strict=True)
    ):
        table[subject, first:last] = True
        table[subject, position : position + length] = True
        position += length
    for subject in range(len(layout.concepts)):
        count = layout.again(subject)
        table[subject, position : position + count] = True
        position += count
    image = table.to(device)[ids]  # (B,M,K)
    text = image.new_ones(image.shape[0], layout.start, keys)
    return torch.cat((text, image), dim=1)[:, None]
