"""What happens at block l of every U-Net call.

Both hosts (ComfyUI's patches, diffusers' attention processors) call the same three methods of
:class:`Call` at the same points of a transformer block, so no equation is written twice:

    attn1:  out = call.self_attention(l, q, k, v, grid)   Eq. 6-8, route of block l-1
    norm2:  call.begin_cross_attention(l, z, grid)        the router of block l
    attn2:  out = call.cross_attention(l, q, text)        Eq. 5, route of block l

and :meth:`Call.record` after the pass.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..bases.base import Site
from ..routing.agreement import Agreement, Alone
from ..routing.grids import Crops, Grid, SoftMaps
from ..routing.words import TextRoutes
from . import equations
from .equations import Attend
from .keys import Candidates, KeyValue, Regions
from .prepare import PreparedSubjects
from .rows import Rows, add, is_range, scatter, take

# Tokens of a row: the mini model's and SDXL's least grid at 256x256 and 512x512.
LEAST_SORTED = 256


class Attention(Protocol):
    """Dense attention over (B,Q,D), (B,K,D), (B,K,D) with D split into heads -> (B,Q,D).

    ``mask`` is additive and broadcasts to (B,Q,K)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
    ) -> Tensor: ...


class Recorder(Protocol):
    """Receives the route of a block: ids (rows, Q) uint8 and the soft maps (rows, C, Q)."""

    def record(self, index: int, ids: Tensor, grid: Grid, soft: Tensor) -> None: ...


@dataclass(frozen=True)
class Recording:
    """Which rows of a call are recorded, and by whom."""

    recorder: Recorder
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Shown:
    """What the rows of a call show.

    ``crops`` (B, or empty): the part of the picture that each row shows. Rows in ``apart`` are
    prompts for a part of the picture, which may mean one subject alone, so they take no part in an
    agreement. ``blank``: there is little but noise (:data:`..routing.agreement.BLANK`). Calls of
    one ``kind`` show the same prompts and the same part of the picture, so that routing by text
    goes on from what the last one has found; None: nobody knows what is shown. ``again``: this call
    takes the place of the last one of its kind.
    """

    crops: Crops = ()
    apart: tuple[int, ...] = ()
    blank: bool = False
    kind: Hashable | None = ()
    again: bool = False


def by_region(q: Tensor) -> bool:
    """Sort tokens by region where region sizes cost nothing to read and rows are long enough to
    repay a call for each row and region; elsewhere, and where all those calls would run backwards
    too (a training step of the mini model: 0.87 of the time), one masked call, whose shapes no
    route changes, so that it can be compiled. q (B,Q,D)."""
    if torch.compiler.is_compiling():
        return False
    return q.device.type == "cpu" and q.shape[1] >= LEAST_SORTED and not q.requires_grad


@dataclass
class BlockRoute:
    """The route of block ``index`` on one grid: its soft maps, and their largest candidate."""

    index: int
    soft: SoftMaps
    ids: Tensor  # (b,Q) long
    _spread: dict[tuple[tuple[int, ...], int], Tensor] = field(repr=False)

    @classmethod
    def of(cls, index: int, soft: SoftMaps) -> BlockRoute:
        return cls(index, soft, soft.maps.argmax(dim=1), {})

    def spread(self, places: tuple[int, ...], rows: int) -> Tensor:
        """(rows,Q): row i of the ids, of as many as there are ``places``, in row ``places[i]``; the
        others are background."""
        if (places, rows) not in self._spread:
            background = self.soft.maps.shape[1] - 1
            ids = take(self.ids, tuple(range(len(places))))
            if not is_range(places):
                spread = ids.new_full((rows, ids.shape[1]), background)
                spread[list(places)] = ids
            elif len(places) == rows:
                spread = ids
            else:
                after = rows - places[0] - len(places)
                edges = (0, 0, places[0], after)
                spread = torch.nn.functional.pad(ids, edges, value=background)
            self._spread[places, rows] = spread
        return self._spread[places, rows]


@dataclass
class Call:
    """One forward pass of the U-Net; holds the route of the block that ran last.

    ``factors`` (N): how much of its strengths each subject has now, 0 outside of its window.
    ``recording``: whose routes are recorded. ``plain``: attention of rows to which nothing is
    done, as they would have it without a call; None: ``attention``.
    """

    prepared: PreparedSubjects
    rows: Rows
    factors: tuple[float, ...]
    sites: Sequence[Site]
    attention: Attention
    shown: Shown = Shown()
    recording: Recording | None = None
    plain: Attention | None = None
    _latest: BlockRoute | None = None
    _found: list[BlockRoute] = field(default_factory=list[BlockRoute])  # that are to be recorded
    _waiting: dict[int, Grid] = field(default_factory=dict[int, Grid])  # for the block's query

    def __post_init__(self) -> None:
        keeps = self.prepared.keep_references_in_uncond
        self._routed = self.rows.cond + (self.rows.uncond if keeps else ())
        self._crops = (
            tuple(self.shown.crops[row] for row in self._routed) if self.shown.crops else ()
        )
        factors = (*self.factors, 1.0)
        self._eta = tuple(e * f for e, f in zip(self.prepared.strengths, factors, strict=True))
        self._gamma = tuple(
            g + math.log(f) if f > 0 else -math.inf
            for g, f in zip(self.prepared.biases, factors, strict=True)
        )
        subjects = enumerate(zip(self._eta[:-1], self._gamma[:-1], strict=True))
        acting = [i for i, (e, g) in subjects if e > 0 or g > -math.inf]
        places = enumerate(self._routed)
        self._agreeing = tuple(place for place, row in places if row not in self.shown.apart)
        self._agreement: Agreement | Alone | None = None
        if self.prepared.agree and self._agreeing:
            if len(acting) > 1:
                self._agreement = Agreement()
            elif acting and self.shown.blank:
                self._agreement = Alone(acting[0])
        if isinstance(self.prepared.source, TextRoutes):
            rows, shown = (len(self.rows.cond), len(self._routed)), self.shown
            kind = None if shown.kind is None else (shown.kind, self._crops, *rows)
            self._memory = self.prepared.source.memory(kind, again=shown.again)

    @property
    def everywhere(self) -> bool:
        """Whether the subject that acts alone has every place, whatever the router says
        (:mod:`..routing.agreement`)."""
        return isinstance(self._agreement, Alone)

    @property
    def plain_rows(self) -> int:
        """How many unconditional rows go without references."""
        return 0 if self.prepared.keep_references_in_uncond else len(self.rows.uncond)

    def begin_cross_attention(self, index: int, z: Tensor, grid: Grid) -> None:
        """z (B,Q,D): ``norm2`` output of block ``index``; grid: its (h,w), h*w = Q."""
        if not self._routed:
            return
        if isinstance(self.prepared.source, TextRoutes):
            self._waiting[index] = grid
            return
        site = self.sites[index - 1]
        soft = self.prepared.source.maps(site, take(z, self._routed), grid, self._crops)
        if self._agreement is not None:
            maps = self._agreement.settle(index, take(soft.maps, self._agreeing), grid)
            if len(self._agreeing) < len(self._routed):
                settled, maps = maps, soft.maps.clone()
                maps[list(self._agreeing)] = settled
            soft = replace(soft, maps=maps)
        self._set_route(index, soft)

    def _begin_by_query(self, index: int, q: Tensor) -> None:
        """The route of a source that reads the attn2 query, which comes after ``norm2``."""
        grid = self._waiting.pop(index, None)
        if grid is None or not isinstance(self.prepared.source, TextRoutes):
            return
        soft = self.prepared.source.maps_of_query(
            self.sites[index - 1],
            take(q, self._routed),
            grid,
            self._crops,
            self._memory,
        )
        self._set_route(index, soft)

    def _set_route(self, index: int, soft: SoftMaps) -> None:
        # What a router scored is not kept: 44 MB a row and block at 2048x2048.
        route = BlockRoute.of(index, SoftMaps(soft.maps, soft.grid))
        self._latest = route
        if self.recording is not None:
            self._found.append(route)

    def record(self) -> None:
        """After the pass: hand its routes over to the recorder. Inside of it nothing is done to
        objects that outlive it, so that a compiled model may run it."""
        if self.recording is None:
            return
        rows = tuple(self._routed.index(row) for row in self.recording.rows)
        for route in self._found:
            ids, maps = take(route.ids, rows).to(torch.uint8), take(route.soft.maps, rows)
            self.recording.recorder.record(route.index, ids, route.soft.grid, maps)
        self._found.clear()

    def _route(self, index: int) -> BlockRoute | None:
        """The route of block ``index``, None where it has none or has passed."""
        route = self._latest
        return route if route is not None and route.index == index else None

    def _route_on(self, index: int, grid: Grid) -> BlockRoute | None:
        """The route of block ``index`` carried to ``grid``: soft maps resized, then argmax."""
        route = self._route(index)
        if route is None or route.soft.grid == grid:
            return route
        return BlockRoute.of(index, self.prepared.source.resize(route.soft, grid, self._crops))

    def _attend(self, index: int) -> Attend:
        """Dense attention with the heads of block ``index``."""
        return partial(self.attention, heads=self.sites[index - 1].heads)

    def cross_attention(self, index: int, q: Tensor, text: Tensor) -> Tensor:
        """q (B,Q,D) and the text attention's output (B,Q,D) -> Eq. 5, before ``to_out``."""
        conditions = self.prepared.conditions[index - 1].clip
        self._begin_by_query(index, q)
        route = self._route(index)
        cond = self.rows.cond if route is not None else ()
        background = conditions[-1]
        uncond = self.rows.uncond if background is not None else ()
        attend = self._attend(index)
        if route is not None and cond and conditions.rows == 1:
            # One set of keys for all rows, and unconditional rows are all background: they attend
            # together.
            rows = tuple(sorted(cond + uncond))
            ids = route.spread(tuple(map(rows.index, cond)), len(rows))
            term = self._routed_clip(take(q, rows), conditions, ids, attend)
            return self._added(index, text, rows, term)
        terms: list[Tensor] = []
        if route is not None and cond:
            ids = route.ids[: len(cond)]
            terms.append(self._routed_clip(take(q, cond), conditions, ids, attend))
        if uncond and background is not None:
            own = take(q, uncond)
            terms.append(equations.clip_everywhere(own, background.to(q), self._eta[-1], attend))
        if not terms:
            return text
        term = terms[0] if len(terms) == 1 else torch.cat(terms)
        return self._added(index, text, cond + uncond, term)

    def _added(self, index: int, text: Tensor, rows: tuple[int, ...], term: Tensor) -> Tensor:
        """``text`` (B,Q,D) and Eq. 5's second term (b,Q,D) of these rows, gated where the weights
        have a gate. Where another pack has run attn2 already, ``text`` is 0 and the gate 1."""
        gate = self.prepared.conditions[index - 1].gate
        if gate is not None:
            term = term * equations.text_gate(take(text, rows), gate).to(term)
        return add(text, rows, term)

    def _routed_clip(
        self, q: Tensor, conditions: Candidates, ids: Tensor, attend: Attend
    ) -> Tensor:
        """q (b,Q,D), each token by its region ``ids`` (b,Q)."""
        if not by_region(q):
            return equations.clip_masked(q, conditions, self._eta, ids, attend)
        given = conditions.given([eta > 0 for eta in self._eta], q)
        tokens = q.flatten(0, 1)[None] if conditions.rows == 1 else q
        regions = Regions.of(ids.reshape(tokens.shape[:2]), len(given))
        return equations.clip_by_region(tokens, given, self._eta, regions, attend).view_as(q)

    def self_attention(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid
    ) -> Tensor | None:
        """q, k, v (B,Q,D) of self-attention -> its output with references, before ``to_out``; None
        when this block has nothing to add and the plain attention is right."""
        if index == 1 or not self._routed:
            return None
        references = self.prepared.conditions[index - 1].reference
        if all(b == -math.inf or r is None for r, b in zip(references, self._gamma, strict=True)):
            return None
        route = self._route_on(index - 1, grid)
        if route is None:
            return None
        attend = self._attend(index)
        # Where rows are short a second call costs more than keys that are closed to plain rows.
        together = q.shape[1] < LEAST_SORTED and not by_region(q) and references.rows == 1
        rows = tuple(range(q.shape[0])) if together else self._routed
        tokens, own = take(q, rows), KeyValue(take(k, rows), take(v, rows))
        if by_region(q):
            given = references.given([gamma > -math.inf for gamma in self._gamma], q)
            regions = Regions.of(route.ids, len(given))
            routed = equations.reference_by_region(tokens, own, given, self._gamma, regions, attend)
        else:
            ids = route.spread(self._routed, len(rows)) if together else route.ids
            routed = equations.reference_masked(tokens, own, references, self._gamma, ids, attend)
        plain = tuple(row for row in range(q.shape[0]) if row not in rows)
        if not plain:
            return scatter(routed, rows)
        usual = self.plain or self.attention
        heads = self.sites[index - 1].heads
        rest = usual(take(q, plain), take(k, plain), take(v, plain), heads)
        return scatter(torch.cat((routed, rest)), rows + plain)
