"""What the base learns besides pictures of captions: to look things up by self-attention.

Stage 1 trains on a frozen base, and what it adds is found by the base's own queries. SDXL's have
learned from its many pictures to find the other eye, the next window, the same thing again; the
queries of a base that has seen little but captions find nothing (docs/mini.md has the figures). So
the base is also shown a reference. Its own weights read it, as the ReferenceNet that begins from
them will: at timestep 0, without text, by :class:`~anystory_core.reference_net.ReferenceNet`
itself. It enters as in stage 1 (Eq. 6 with K~ = K and V~ = V), in the subject's place.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from ..conditioner import Call, Rows
from ..config import AnyStoryConfig
from ..injection import Candidates, KeyValue
from ..reference_net import ReferenceNet
from ..run import Run, SiteConditions
from ..sites import build_sites
from ..training import diffusers_unet
from ..training.names import ldm_to_diffusers
from .row_masks import RowMasks


class Reader:
    """Reads references with a diffusers U-Net's own weights. ``slot`` is where a call is put."""

    def __init__(self, unet: Any, config: AnyStoryConfig) -> None:
        self.unet, self.sites = unet, build_sites(config.unet)
        self.slot = diffusers_unet.install(unet, self.sites)
        self.net = ReferenceNet(config, device="meta")
        table = ldm_to_diffusers(config)
        self._names = {ours: table[ours] for ours in self.net.state_dict()}

    def features(self, latents: Tensor) -> tuple[Tensor, ...]:
        """G^2..G^L of reference latents (n,4,r,r). The mask's channel has no weight."""
        weights = dict(self.unet.named_parameters())
        tied = {ours: weights[theirs] for ours, theirs in self._names.items()}
        first = "input_blocks.0.0.weight"
        tied[first] = functional.pad(tied[first], (0, 0, 0, 0, 0, 1))
        return functional_call(self.net, tied, (functional.pad(latents, (0, 0, 0, 0, 0, 1)),))

    def call(self, latents: Tensor, regions: Tensor) -> Call:
        """The first n rows of a pass read references (n,4,r,r) where ``regions`` (n,h,w) in [0,1]
        is at least a half; differentiable."""
        features = self.features(latents)
        conditions: list[SiteConditions] = []
        for site in self.sites:
            read = None
            if site.index > 1:
                attn, given = (
                    self.unet.get_submodule(site.diffusers).attn1,
                    features[site.index - 2],
                )
                read = KeyValue(attn.to_k(given), attn.to_v(given))
            conditions.append(SiteConditions(Candidates([None, None]), Candidates([read, None])))
        run = Run(tuple(conditions), RowMasks.of(regions[:, None]), (1.0, 1.0), (0.0, -math.inf))
        rows = Rows(tuple(range(len(latents))))
        return Call(run, rows, (True,), self.sites, diffusers_unet.dense_attention)
