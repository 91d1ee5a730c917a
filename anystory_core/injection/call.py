"""What happens at block l of every U-Net call.

Both hosts (ComfyUI's patches, diffusers' attention processors) call the same three methods of
:class:`Call` at the same points of a transformer block, so no equation is written twice:

    attn1:  out = call.self_attention(l, q, k, v, grid)   Eq. 6-8, route of block l-1
    norm2:  call.begin_cross_attention(l, z, grid)        the router of block l
    attn2:  out = call.cross_attention(l, q, text)        Eq. 5, route of block l
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..bases.sdxl.sites import Site
from ..routing.agreement import Agreement
from ..routing.sources import Crops, Grid, SoftMaps
from ..routing.words import TextRoutes
from . import equations as injection
from .equations import Attention, Candidates, Regions
from .run import Run

# Tokens of a row: the mini model's and SDXL's least grid at 256x256 and 512x512.
LEAST_SORTED = 256


@dataclass(frozen=True)
class Rows:
    """Which batch rows are conditional and which unconditional; rows in neither stay plain."""

    cond: tuple[int, ...]
    uncond: tuple[int, ...] = ()


class Recorder(Protocol):
    """Receives the route of a block: ids (rows, Q) uint8 and the soft maps (rows, C, Q)."""

    def record(self, index: int, ids: Tensor, grid: Grid, soft: Tensor) -> None: ...


def by_region(q: Tensor) -> bool:
    """Sort tokens by region where region sizes cost nothing to read and rows are long enough to
    repay a call for each row and region; elsewhere, and where all those calls would run backwards
    too (a training step of the mini model: 0.87 of the time), one masked call. q (B,Q,D)."""
    return q.device.type == "cpu" and q.shape[1] >= LEAST_SORTED and not q.requires_grad


@dataclass
class _Route:
    """The route of one block on one grid."""

    soft: SoftMaps
    ids: Tensor  # (b,Q) long
    weights: Tensor | None = None  # straight-through one-hot (b,C,Q), training only


@dataclass
class Call:
    """One forward pass of the U-Net; holds its routes.

    ``active`` (N) says which subjects are inside their window. ``crops`` (B, or empty) is the part
    of the picture that each row shows; rows in ``apart`` are prompts for a part of the picture,
    which may mean one subject alone, so they take no part in an agreement. ``recorder`` gets the
    route of the rows in ``record``. ``gumbel`` (training; a seed per row, or empty): sigma in Eq. 5
    is then the straight-through Gumbel-softmax, while Eq. 6-8 use the noise-free argmax. ``kind``:
    calls of one kind show the same prompts and the same part of the picture, so that routing by
    text goes on from what the last one has found; None: nobody knows what this call shows.
    """

    run: Run
    rows: Rows
    active: tuple[bool, ...]
    sites: Sequence[Site]
    attention: Attention
    crops: Crops = ()
    recorder: Recorder | None = None
    record: tuple[int, ...] = ()
    gumbel: tuple[int, ...] = ()
    apart: tuple[int, ...] = ()
    kind: Hashable | None = ()
    soft_maps: dict[int, SoftMaps] = field(default_factory=dict[int, SoftMaps])
    _routes: dict[int, _Route] = field(default_factory=dict[int, _Route])
    _waiting: dict[int, Grid] = field(default_factory=dict[int, Grid])  # for the block's query

    def __post_init__(self) -> None:
        keeps = self.run.keep_references_in_uncond
        self._routed = self.rows.cond + (self.rows.uncond if keeps else ())
        self._crops = tuple(self.crops[row] for row in self._routed) if self.crops else ()
        on = (*self.active, True)
        self._eta = tuple(e if a else 0.0 for e, a in zip(self.run.strengths, on, strict=True))
        self._gamma = tuple(g if a else -math.inf for g, a in zip(self.run.biases, on, strict=True))
        subjects = zip(self._eta[:-1], self._gamma[:-1], strict=True)
        acting = sum(e > 0 or g > -math.inf for e, g in subjects)
        places = enumerate(self._routed)
        self._agreeing = tuple(place for place, row in places if row not in self.apart)
        agree = self.run.agree and acting > 1 and self._agreeing
        self._agreement = Agreement() if agree else None
        if isinstance(self.run.source, TextRoutes):
            rows = len(self.rows.cond), len(self._routed)
            kind = None if self.kind is None else (self.kind, self._crops, *rows)
            self._memory = self.run.source.memory(kind)

    def begin_cross_attention(self, index: int, z: Tensor, grid: Grid) -> None:
        """z (B,Q,D): ``norm2`` output of block ``index``; grid: its (h,w), h*w = Q."""
        if not self._routed:
            return
        if isinstance(self.run.source, TextRoutes):
            self._waiting[index] = grid
            return
        site = self.sites[index - 1]
        soft = self.run.source.maps(site, _take(z, self._routed), grid, self._crops)
        if self._agreement is not None:
            maps = self._agreement.settle(index, _take(soft.maps, self._agreeing), grid)
            if len(self._agreeing) < len(self._routed):
                settled, maps = maps, soft.maps.clone()
                maps[list(self._agreeing)] = settled
            soft = replace(soft, maps=maps)
        self._set_route(index, soft)

    def _begin_by_query(self, index: int, q: Tensor) -> None:
        """The route of a source that reads the attn2 query, which comes after ``norm2``."""
        grid = self._waiting.pop(index, None)
        if grid is None or not isinstance(self.run.source, TextRoutes):
            return
        soft = self.run.source.maps_of_query(
            self.sites[index - 1],
            _take(q, self._routed),
            grid,
            self._crops,
            self._memory,
        )
        self._set_route(index, soft)

    def _set_route(self, index: int, soft: SoftMaps) -> None:
        route = _Route(soft, soft.maps.argmax(dim=1))
        if self.gumbel and soft.logits is not None:
            seeds = [self.gumbel[row] * len(self.sites) + index for row in self._routed]
            route.weights = straight_through(soft.logits.refined, seeds)
        self._routes[index] = route
        # Under activation checkpointing a block runs again in the backward pass; the first maps
        # are the ones that the loss has seen.
        self.soft_maps.setdefault(index, soft)
        if self.recorder is not None and self.record:
            rows = tuple(self._routed.index(row) for row in self.record)
            ids = _take(route.ids, rows).to(torch.uint8)
            self.recorder.record(index, ids, soft.grid, _take(soft.maps, rows))

    def _route_on(self, index: int, grid: Grid) -> _Route | None:
        """The route of block ``index`` carried to ``grid``: soft maps resized, then argmax."""
        route = self._routes.get(index)
        if route is None or route.soft.grid == grid:
            return route
        soft = self.run.source.resize(route.soft, grid, self._crops)
        return _Route(soft, soft.maps.argmax(dim=1))

    def cross_attention(self, index: int, q: Tensor, text: Tensor) -> Tensor:
        """q (B,Q,D) and the text attention's output (B,Q,D) -> Eq. 5, before ``to_out``."""
        conditions = self.run.conditions[index - 1].clip
        heads = self.sites[index - 1].heads
        self._begin_by_query(index, q)
        route = self._routes.get(index)
        cond = self.rows.cond if route is not None else ()
        background = conditions[-1]
        uncond = self.rows.uncond if background is not None else ()
        if route is not None and cond and route.weights is None and conditions.rows == 1:
            # One set of keys for all rows, and unconditional rows are all background: they attend
            # together.
            rows = tuple(sorted(cond + uncond))
            ids = self._spread(route.ids[: len(cond)], tuple(map(rows.index, cond)), len(rows))
            return _add(text, rows, self._routed_clip(_take(q, rows), conditions, ids, heads))
        terms: list[Tensor] = []
        if route is not None and cond:
            own = _take(q, cond)
            if route.weights is None:
                terms.append(self._routed_clip(own, conditions, route.ids[: len(cond)], heads))
            else:
                weights = route.weights[: len(cond)]
                given = conditions.given([eta > 0 for eta in self._eta], own)
                terms.append(
                    injection.clip_dense(own, given, self._eta, weights, heads, self.attention)
                )
        if uncond and background is not None:
            own, shared = _take(q, uncond), background.to(q)
            terms.append(
                injection.clip_everywhere(own, shared, self._eta[-1], heads, self.attention)
            )
        if not terms:
            return text
        return _add(text, cond + uncond, terms[0] if len(terms) == 1 else torch.cat(terms))

    def _routed_clip(self, q: Tensor, conditions: Candidates, ids: Tensor, heads: int) -> Tensor:
        """q (b,Q,D), each token by its region ``ids`` (b,Q)."""
        if not by_region(q):
            return injection.clip_masked(
                q, conditions, self._eta, ids, heads, self.attention, self.run.tables
            )
        given = conditions.given([eta > 0 for eta in self._eta], q)
        tokens = q.flatten(0, 1)[None] if conditions.rows == 1 else q
        regions = Regions.of(ids.reshape(tokens.shape[:2]), len(given))
        return injection.clip_by_region(
            tokens, given, self._eta, regions, heads, self.attention
        ).view_as(q)

    def _spread(self, ids: Tensor, places: tuple[int, ...], rows: int) -> Tensor:
        """Row i of ``ids`` becomes row ``places[i]`` of ``rows``; the others are background."""
        if _is_range(places):
            if len(places) == rows:
                return ids
            after = rows - places[0] - len(places)
            background = self.run.subjects
            return torch.nn.functional.pad(ids, (0, 0, places[0], after), value=background)
        spread = ids.new_full((rows, ids.shape[1]), self.run.subjects)
        spread[list(places)] = ids
        return spread

    def self_attention(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid
    ) -> Tensor | None:
        """q, k, v (B,Q,D) of self-attention -> its output with references, before ``to_out``; None
        when this block has nothing to add and the plain attention is right."""
        if index == 1 or not self._routed:
            return None
        references = self.run.conditions[index - 1].reference
        if all(b == -math.inf or r is None for r, b in zip(references, self._gamma, strict=True)):
            return None
        route = self._route_on(index - 1, grid)
        if route is None:
            return None
        heads, attention = self.sites[index - 1].heads, self.attention
        # Where rows are short a second call costs more than keys that are closed to plain rows.
        together = q.shape[1] < LEAST_SORTED and not by_region(q) and references.rows == 1
        rows = tuple(range(q.shape[0])) if together else self._routed
        q_, k_, v_ = (_take(x, rows) for x in (q, k, v))
        if by_region(q):
            given = references.given([gamma > -math.inf for gamma in self._gamma], q)
            regions = Regions.of(route.ids, len(given))
            routed = injection.reference_by_region(
                q_, k_, v_, given, self._gamma, regions, heads, attention
            )
        else:
            ids = self._spread(route.ids, self._routed, len(rows)) if together else route.ids
            routed = injection.reference_masked(
                q_, k_, v_, references, self._gamma, ids, heads, attention, self.run.tables
            )
        plain = tuple(row for row in range(q.shape[0]) if row not in rows)
        if not plain:
            return _scatter(routed, rows)
        rest = attention(_take(q, plain), _take(k, plain), _take(v, plain), heads)
        return _scatter(torch.cat((routed, rest)), rows + plain)


def straight_through(logits: Tensor, seeds: Sequence[int]) -> Tensor:
    """Straight-through Gumbel-softmax (tau = 1) over candidates: (B,C,Q) -> one-hot weights whose
    gradient is that of the soft sample. Noise is a function of the row's seed alone, so it is the
    same when a block is recomputed, after a resume, and on any number of processes."""
    noise = torch.stack(
        [
            torch.rand(
                logits.shape[1:],
                generator=torch.Generator(logits.device).manual_seed(seed),
                device=logits.device,
                dtype=logits.dtype,
            )
            for seed in seeds
        ]
    )
    tiny = torch.finfo(logits.dtype).tiny
    exponential = (-torch.log(noise.clamp_min(tiny))).clamp_min(tiny)
    gumbel = -torch.log(exponential)
    soft = (logits + gumbel).softmax(dim=1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


def _is_range(rows: tuple[int, ...]) -> bool:
    return rows == tuple(range(rows[0], rows[0] + len(rows)))


def _take(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Rows of a batch; a view when they lie together."""
    if _is_range(rows):
        return x if len(rows) == x.shape[0] else x[rows[0] : rows[0] + len(rows)]
    return x[list(rows)]


def _add(x: Tensor, rows: tuple[int, ...], term: Tensor) -> Tensor:
    """x with row i of ``term`` added to row ``rows[i]``; x itself is not written to.

    No list of rows becomes a tensor where rows lie together, as they do in a host's batches: on a
    GPU each such tensor is a copy that waits for the queue."""
    term = term.to(x.dtype)
    if len(rows) == x.shape[0]:
        return x + _scatter(term, rows)
    if _is_range(rows):
        first, last = rows[0], rows[0] + len(rows)
        return torch.cat((x[:first], x[first:last] + term, x[last:]))
    return x.index_add(0, torch.tensor(rows, device=x.device), term)


def _scatter(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Row i of x becomes row ``rows[i]`` of the result; ``rows`` is a permutation."""
    if _is_range(rows):
        return x
    # Two ranges in turned order, as a host's negative and positive rows: one copy, no index.
    half = rows.index(min(rows))
    if rows[half:] + rows[:half] == tuple(range(len(rows))):
        return torch.cat((x[half:], x[:half]))
    back = sorted(range(len(rows)), key=rows.__getitem__)
    return x[back]
