"""What happens at block l of one forward pass of FLUX with subjects.

The host gives the pass a longer text (:meth:`FluxCall.extend`), calls :meth:`FluxCall.attend` for
the attention of every block, and, where the router decides, :meth:`FluxCall.double` and
:meth:`FluxCall.single` in place of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .attention import (
    Given,
    Grid,
    Layout,
    attend_by_region,
    attend_masked,
    attend_open,
    attend_plain,
)
from .blocks import Guide, Tokens, double_block, single_block
from .host import DoubleBlock, Flux, HeadAttention, SingleBlock
from .reference import HeadKeys, References
from .router import Router, route
from .sites import FluxSite

# Image tokens of a row: below, the calls of every region cost more than keys that are closed to it.
LEAST_SORTED = 256


class Recorder(Protocol):
    """Receives the route of a block: ids (rows,M) uint8, N for nobody; soft maps (rows,N+1,M)."""

    def record(self, index: int, ids: Tensor, grid: Grid, soft: Tensor) -> None: ...


@dataclass(frozen=True)
class RowGroup:
    """Batch rows that share a prompt. They take part with ``references`` of that prompt (None: the
    references are off), or not at all."""

    rows: tuple[int, ...]
    acts: bool
    references: References | None = None


@dataclass(frozen=True)
class Concepts:
    """The subjects' tokens in the text stream, each (n_i,C) at its strength; None: it has none.
    ``repeats[i]``: the last of them stands for so many more; nothing: none does."""

    tokens: tuple[Tensor | None, ...]
    repeats: tuple[int, ...] = ()

    @classmethod
    def merged(cls, tokens: Sequence[Tensor | None]) -> Concepts:
        """With one token for all of a subject's empty places (:mod:`.attention`)."""
        found: list[Tensor | None] = []
        repeats: list[int] = []
        for own in tokens:
            empty = None if own is None else (own == 0).all(dim=-1)
            count = 0 if empty is None else int(empty.sum())
            if own is not None and empty is not None and count > 1:
                own = torch.cat((own[~empty], own[empty][:1]))
            found.append(own)
            repeats.append(max(0, count - 1))
        return cls(tuple(found), tuple(repeats))

    @property
    def lengths(self) -> tuple[int, ...]:
        """n_i of every subject."""
        return tuple(0 if x is None else x.shape[0] for x in self.tokens)

    def behind(self, context: Tensor) -> Tensor:
        """context (B,T,C) -> (B,T+sum n_i,C)."""
        own = [x.to(context)[None] for x in self.tokens if x is not None]
        return torch.cat((context, *(x.expand(context.shape[0], -1, -1) for x in own)), dim=1)


@dataclass
class FluxCall:
    """One forward pass; holds its routes and the router's tokens.

    biases (N): gamma of each subject's references, -inf: off at this call. regions (A,M): region
    ids given from outside, for the rows of the groups that act, in their order. ``router`` decides
    where regions is None, on image tokens that ``allowed`` (A or 1,N,M) leaves to a subject. With
    neither, every token looks at all subjects. ``recorder`` gets the route of the rows in
    ``record``. ``attention`` serves the main sequence, ``aside`` the router's tokens.
    """

    sites: Sequence[FluxSite]
    layout: Layout
    groups: tuple[RowGroup, ...]
    biases: tuple[float, ...]
    attention: HeadAttention
    aside: HeadAttention
    regions: Tensor | None = None
    router: Router | None = None
    allowed: Tensor | None = None
    recorder: Recorder | None = None
    record: tuple[int, ...] = ()
    hidden: Tensor | None = field(default=None, repr=False)  # the router's tokens (B,P,d)
    _ids: dict[int, Tensor] = field(default_factory=dict[int, Tensor], repr=False)

    def __post_init__(self) -> None:
        self._acting = tuple(row for group in self.groups if group.acts for row in group.rows)
        self._doubles = sum(site.kind == "double" for site in self.sites)

    @property
    def rows(self) -> int:
        """B, those included that take no part."""
        return sum(len(group.rows) for group in self.groups)

    @property
    def routes_itself(self) -> bool:
        """Whether blocks must be computed by :meth:`double` and :meth:`single`."""
        return self.router is not None and self.regions is None and bool(self._acting)

    def enter(self, net: Flux, like: Tensor) -> None:
        """Bring the router's tokens into the stream, before the first block."""
        if self.router is not None and self.routes_itself:
            self.hidden = self.router.enter(net, self.rows, like)

    def attend(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The attention of block ``index``: q, k, v (B,H,L,h) after norm and rotation -> (B,L,d).
        mask: the host's own over the sequence, or None."""
        ids = self._ids.get(index) if self.regions is None else self.regions
        if self.regions is not None:
            self._record(index, self.regions, None)
        elif ids is None and len(self.biases) == 1:  # all is the only subject's
            shape = len(self._acting), self.layout.image
            self._record(index, torch.zeros(shape, dtype=torch.long, device=q.device), None)
        outs: list[Tensor] = []
        rows: tuple[int, ...] = ()
        first = 0
        for group in self.groups:
            rows += group.rows
            q_, k_, v_ = (take(x, group.rows) for x in (q, k, v))
            mask_ = (
                mask
                if mask is None or mask.ndim == 2 or mask.shape[0] == 1
                else take(mask, group.rows)
            )
            if not group.acts:
                outs.append(attend_plain(q_, k_, v_, self.layout, self.attention, mask_))
                continue
            last = first + len(group.rows)
            own = None if ids is None else ids[first:last]
            first = last
            outs.append(self._routed(index, q_, k_, v_, group.references, own, mask_))
        if len(outs) == 1:
            return outs[0]
        return take(torch.cat(outs), tuple(sorted(range(len(rows)), key=rows.__getitem__)))

    def _routed(
        self,
        index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        references: References | None,
        ids: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """The rows of one acting group."""
        none: tuple[HeadKeys | None, ...] = (None,) * len(self.biases)
        given = Given.of(none if references is None else references.blocks[index - 1], self.biases)
        if mask is not None:
            return attend_masked(q, k, v, given, ids, self.layout, self.attention, mask)
        if ids is None:
            return attend_open(q, k, v, given, self.layout, self.attention)
        if self.layout.image < LEAST_SORTED:
            return attend_masked(q, k, v, given, ids, self.layout, self.attention)
        return attend_by_region(q, k, v, given, ids, self.layout, self.attention)

    def double(
        self,
        number: int,
        block: DoubleBlock,
        text: Tensor,
        image: Tensor,
        vec: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Double block ``number``: text (B,S,d), image (B,M,d) -> both after the block."""
        router, hidden = self._stream()
        index = number + 1
        tokens = double_block(
            block,
            router.branches.double_at(number),
            router.maps.at(index),
            Tokens(text, image, hidden),
            vec,
            positions,
            self._guide(index, router, mask),
        )
        self.hidden = tokens.router
        return tokens.text, tokens.image

    def single(
        self,
        number: int,
        block: SingleBlock,
        x: Tensor,
        vec: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Single block ``number``: x (B,L,d) = [text, image] -> x after the block."""
        router, hidden = self._stream()
        index = self._doubles + number + 1
        x, self.hidden = single_block(
            block,
            router.branches.single_at(number),
            router.maps.at(index),
            x,
            hidden,
            self.layout.start,
            vec,
            positions,
            self._guide(index, router, mask),
        )
        return x

    def _stream(self) -> tuple[Router, Tensor]:
        if self.router is None or self.hidden is None:
            raise RuntimeError("FluxCall: a block was asked for before `enter`")
        return self.router, self.hidden

    def _guide(self, index: int, router: Router, mask: Tensor | None) -> Guide:
        site = self.sites[index - 1]

        def found(queries: Tensor, keys: Tensor) -> None:
            self._ids[index], logits = route(queries, keys, self.allowed)
            self._record(index, self._ids[index], logits)

        return Guide(
            heads=site.heads,
            lengths=router.lengths,
            take=lambda x: take(x, self._acting),
            found=found,
            attend=lambda q, k, v: self.attend(index, q, k, v, mask),
            attention=self.aside,
            last=index == len(self.sites),
        )

    def _record(self, index: int, ids: Tensor, logits: Tensor | None) -> None:
        if self.recorder is None or not self.record:
            return
        places = tuple(self._acting.index(row) for row in self.record)
        ids = take(ids, places)
        subjects = len(self.biases)
        if logits is None:
            one_hot = torch.nn.functional.one_hot(ids.long(), subjects + 1)
            soft = one_hot.movedim(-1, 1).float()
        else:
            own = take(logits, places).softmax(dim=1).nan_to_num()
            soft = torch.cat((own, 1 - own.sum(dim=1, keepdim=True)), dim=1)
        self.recorder.record(index, ids.to(torch.uint8), self.layout.grid, soft)


def take(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Rows of a batch; a view where they lie together, as they do in a host's batches."""
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return x if len(rows) == x.shape[0] else x[rows[0] : rows[0] + len(rows)]
    return x[list(rows)]
