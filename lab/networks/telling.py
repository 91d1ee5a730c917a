"""What the base learns for the router's sake: its hidden states say what is where.

The router (paper 3.3) reads places off ``norm2``'s output by one linear map. SDXL's hidden states
are known to hold what a segmentation needs (its router is trained on a frozen base); those of a
small base that has only learned to remove noise do not: a router on them found half of what perfect
masks give, on subjects that it had seen and on held-out ones alike (docs/mini.md). So the base is
also asked, at every block, which tokens show which of the subjects that CLIP describes: the same
inner product as a router's coarse map. Its loss is the cross-entropy and the error of the maps by
area, to which small subjects count as much as large ones. Where references are read in places that
were given nobody asks: those places would be the answer. The heads that ask are not shipped; stage
2 trains its routers anew.

What the heads answer is a route like any other (:meth:`Teller.routes`), so the base also learns to
draw several references where its own hidden states send them, as it will have to with a router:
vaguely while there is little but noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from anystory_core.bases.base import Site
from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.sites import UNetSite, build_sites
from anystory_core.routing.grids import Crops, Grid, SoftMaps, resize_soft
from anystory_core.training.losses import map_error, target_maps

from .clip_branch import ClipBranch


def look_width(config: AnyStoryConfig) -> int:
    """Width of a description: CLIP's class token and the mean of its patches."""
    return 2 * config.clip.width


def describe(states: Tensor) -> Tensor:
    """CLIP states (B,1+P,W) -> descriptions (B,2W)."""
    return torch.cat((states[:, 0], states[:, 1:].mean(dim=1)), dim=-1)


class Teller(nn.Module):
    """Asks a diffusers U-Net's hidden states where a subject is. ``watch`` it first."""

    def __init__(self, config: AnyStoryConfig) -> None:
        super().__init__()
        sites, width = build_sites(config.unet), look_width(config)
        routing, key = config.routing_dim, config.router.key_dim
        self.look = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, routing))
        self.background = nn.Parameter(torch.zeros(routing))
        self.keys = nn.ModuleList([nn.Linear(routing, key) for _ in sites])
        self.hidden = nn.ModuleList([nn.Linear(s.channels, key, bias=False) for s in sites])
        self._seen: list[Tensor] = []

    def watch(self, unet: Any, sites: Sequence[UNetSite]) -> None:
        """Keep what each block's ``norm2`` gives in a pass; :meth:`loss` takes it."""
        for site in sites:
            unet.get_submodule(site.diffusers).norm2.register_forward_hook(self._keep)

    def _keep(self, norm: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen.append(output)

    def loss(self, rows: slice, looks: Tensor, subjects: Tensor) -> Tensor:
        """Cross-entropy of the last pass and the error of its maps by area
        (:func:`~anystory_core.training.losses.map_error`), the mean over blocks.

        looks (n,N,2W) of the subjects that ``rows`` show at ``subjects`` (n,N,h,w) in [0,1], empty
        where there are fewer. Each token chooses between its row's subjects, the background, and a
        subject of another row, which is never right."""
        own = self._ask(looks)
        asked = torch.cat((own, own[:, :1].roll(1, 0)), dim=1)  # (n,N+2,R)
        absent = functional.pad(subjects.flatten(2).amax(dim=2) == 0, (0, 2))  # (n,N+2)
        losses: list[Tensor] = []
        for index, seen in enumerate(self._seen):
            side = math.isqrt(seen.shape[1])
            logits = self.answers(index, asked, absent, seen[rows])
            target = target_maps(subjects, (side, side))  # (n,N+1,Q)
            wrong = functional.cross_entropy(logits, target.argmax(dim=1))
            maps = logits.softmax(dim=1)[:, :-1]
            losses.append(wrong + map_error(maps, target, ~absent[:, :-2], "area"))
        if len(losses) != len(self.keys):
            raise ValueError(f"a pass of {len(self.keys)} blocks was expected, got {len(losses)}")
        self._seen.clear()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def routes(self, looks: Tensor, present: Tensor) -> ToldRoutes:
        """Routes of n rows by what the heads answer about looks (n,N,2W), of which those are there
        that ``present`` (n,N) bool says."""
        return ToldRoutes(self, self._ask(looks), functional.pad(~present, (0, 1)))

    def _ask(self, looks: Tensor) -> Tensor:
        """(n,N,2W) -> (n,N+1,R), the background last."""
        own = self.look(looks)
        return torch.cat((own, self.background.expand_as(own[:, :1])), dim=1)

    def answers(self, index: int, asked: Tensor, absent: Tensor, seen: Tensor) -> Tensor:
        """Logits (n,C,Q) of block ``index`` (from 0) for asked (n,C,R) at seen (n,Q,D)."""
        z = self.hidden[index](seen)  # (n,Q,K)
        key = self.keys[index](asked)
        logits = torch.matmul(key, z.transpose(1, 2)).float() / z.shape[-1] ** 0.5
        return logits.masked_fill(absent[:, :, None], -torch.inf)


@dataclass(frozen=True)
class ToldRoutes:
    """A route source of :meth:`Teller.routes`; it has no gradient."""

    teller: Teller
    asked: Tensor  # (n,C,R)
    absent: Tensor  # (n,C) bool

    @property
    def candidates(self) -> int:
        return self.asked.shape[1]

    @property
    def pictures(self) -> int:
        """As of a source that is the same for all pictures."""
        return 1

    @torch.no_grad()
    def maps(self, site: Site, z: Tensor, grid: Grid, crops: Crops) -> SoftMaps:
        logits = self.teller.answers(site.index - 1, self.asked, self.absent, z)
        return SoftMaps(logits.softmax(dim=1), grid)

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        return resize_soft(soft, grid)


class TaughtBase(nn.Module):
    """What the ``base`` phase trains: the U-Net, the heads that question it, and the CLIP branch
    whose tokens it is shown."""

    def __init__(self, unet: Any, config: AnyStoryConfig) -> None:
        super().__init__()
        self.unet = unet
        self.teller = Teller(config)
        self.clip = ClipBranch(config)
