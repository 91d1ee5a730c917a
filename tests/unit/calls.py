"""One U-Net call over random subjects and hidden states, and what the equations give for it."""

from __future__ import annotations

import math
from typing import Any

import naive
import torch
from torch import Tensor

from anystory_core.bases.sdxl.config import UNetConfig
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.config import RouterConfig
from anystory_core.injection.call import Call, Recording
from anystory_core.injection.keys import Candidates, KeyValue
from anystory_core.injection.prepare import PreparedSubjects, SiteConditions
from anystory_core.injection.rows import Rows
from anystory_core.routing.grids import SoftMaps
from anystory_core.routing.router import Routers
from anystory_core.routing.sources import LearnedRoutes

UNET = UNetConfig(
    model_channels=8, channel_mult=(1, 2, 2), transformer_depth=(0, 1, 1), middle_depth=1,
    head_dim=4, context_dim=6, adm_channels=8, norm_groups=4,
)  # fmt: skip
SITES = build_sites(UNET)
Grids = dict[int, tuple[int, int]]  # by stride
HALVING: Grids = {2: (4, 6), 4: (2, 3)}
ODD: Grids = {2: (5, 7), 4: (3, 4)}  # a latent of 9x13
E = 5


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Maps(dict[int, SoftMaps]):
    """A recorder that keeps every block's soft maps by the block's number."""

    def record(self, index: int, ids: Tensor, grid: tuple[int, int], soft: Tensor) -> None:
        assert torch.equal(ids.long(), soft.argmax(dim=1)) and ids.dtype == torch.uint8
        self[index] = SoftMaps(soft, grid)


def maps_of(call: Call) -> Maps:
    """What a call of :meth:`World.call` has recorded."""
    assert call.recording is not None and isinstance(call.recording.recorder, Maps)
    return call.recording.recorder


class World:
    """A run of N subjects and one U-Net call's hidden states."""

    def __init__(
        self, subjects: int = 2, rows: int = 3, seed: int = 0, grids: Grids = HALVING
    ) -> None:
        torch.manual_seed(seed)
        self.subjects, self.rows, self.grids = subjects, rows, grids
        self.routers = Routers(RouterConfig(key_dim=4, heads=2), SITES, routing_dim=E)
        self.routers.to(torch.float64)
        self.routing = 3 * normal(1, subjects + 1, E)
        self.conditions = [
            SiteConditions(
                Candidates(
                    [
                        KeyValue(normal(1, 3, s.channels), normal(1, 3, s.channels))
                        for _ in range(subjects + 1)
                    ]
                ),
                Candidates(
                    [
                        *(
                            KeyValue(normal(1, 4, s.channels), normal(1, 4, s.channels))
                            for _ in range(subjects)
                        ),
                        None,
                    ]
                ),
            )
            for s in SITES
        ]
        self.hidden = {
            s.index: [normal(rows, math.prod(grids[s.stride]), s.channels) for _ in range(6)]
            for s in SITES
        }
        self.eta = tuple(0.5 + 0.1 * i for i in range(subjects)) + (0.8,)
        self.gamma = tuple(math.log(1.0 + i) for i in range(subjects)) + (-math.inf,)

    def run(self, **changes: Any) -> PreparedSubjects:
        source = LearnedRoutes.prepare(self.routers, self.routing)
        values = dict(
            conditions=tuple(self.conditions), source=source, strengths=self.eta, biases=self.gamma
        )
        return PreparedSubjects(**{**values, **changes})

    def call(self, run: PreparedSubjects, rows: Rows, **changes: Any) -> Call:
        """Its maps are recorded for :func:`maps_of`, all routed rows of them, unless told else."""
        routed = rows.cond + (rows.uncond if run.keep_references_in_uncond else ())
        values = dict(
            factors=(1.0,) * self.subjects,
            sites=SITES,
            attention=naive.dense_attention,
            recording=Recording(Maps(), routed),
        )
        return Call(run, rows, **{**values, **changes})

    def forward(self, call: Call) -> dict[int, tuple[Tensor, Tensor]]:
        """(attn1, attn2) outputs of every block, as a host would drive the call."""
        out: dict[int, tuple[Tensor, Tensor]] = {}
        for site in SITES:
            q1, k1, v1, z, q2, text = self.hidden[site.index]
            grid = self.grids[site.stride]
            first = call.self_attention(site.index, q1, k1, v1, grid)
            if first is None:
                first = naive.dense_attention(q1, k1, v1, site.heads)
            call.begin_cross_attention(site.index, z, grid)
            out[site.index] = first, call.cross_attention(site.index, q2, text)
        call.record()
        return out

    def expected(
        self, role: str, row: int, active: tuple[bool, ...] | None = None, keep: bool = False
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """The same from the equations, for one row."""
        active = active or (True,) * self.subjects
        out: dict[int, tuple[Tensor, Tensor]] = {}
        before: tuple[Tensor, tuple[int, int]] | None = None
        for site in SITES:
            q1, k1, v1, z, q2, text = (x[row] for x in self.hidden[site.index])
            grid = self.grids[site.stride]
            maps = naive.router(
                dict(self.routers.at(site.index).state_dict()), self.routing[0], z, 2
            )[1]
            routed = role == "cond" or (keep and role == "uncond")
            references: list[Any] = [None] * (self.subjects + 1)
            route = torch.zeros(len(q1), dtype=torch.long)
            if routed and before is not None:
                maps_before, grid_before = before
                if grid_before != grid:
                    maps_before = naive.resize(maps_before, grid_before, grid)
                route = maps_before.argmax(dim=0)
                for i in range(self.subjects):
                    kv = self.conditions[site.index - 1].reference[i]
                    if active[i] and kv is not None:
                        references[i] = (kv.k[0], kv.v[0])
            first = naive.equation_6(q1, k1, v1, route, references, self.gamma, site.heads)
            clip = [(kv.k[0], kv.v[0]) for kv in self.conditions[site.index - 1].clip if kv]
            if role == "cond":
                eta = [e if on else 0.0 for e, on in zip(self.eta, (*active, True), strict=True)]
                second = naive.equation_5(q2, text, maps.argmax(dim=0), clip, eta, site.heads)
            elif role == "uncond":
                everywhere = torch.full((len(q2),), self.subjects)
                second = naive.equation_5(q2, text, everywhere, clip, self.eta, site.heads)
            else:
                second = text
            before = (maps.float().double(), grid) if routed else None
            out[site.index] = first, second
        return out
