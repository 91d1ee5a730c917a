"""What the base learns besides pictures of captions: to look things up by self-attention.

Stage 1 trains on a frozen base, and what it adds is found by the base's own queries. SDXL's have
learned from its many pictures to find the other eye, the next window, the same thing again; the
queries of a base that has seen little but captions find nothing (docs/mini.md has the figures). So
the base is also shown references of a scene's subjects. Its own weights read them, as the
ReferenceNet that begins from them will: at timestep 0, without text, by
:class:`~anystory_core.bases.sdxl.reference_net.ReferenceNet` itself. They enter as in
stage 1 (Eq. 6 with K~ = K and V~ = V), each where a route sends it, and so do the subjects' CLIP
tokens (Eq. 5, :mod:`.clip_branch`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.names import ldm_to_diffusers
from anystory_core.bases.sdxl.reference_net import ReferenceNet
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.injection.call import Shown
from anystory_core.injection.keys import Candidates, KeyValue
from anystory_core.injection.prepare import PreparedSubjects, SiteConditions
from anystory_core.injection.rows import Rows
from anystory_core.routing.sources import RouteSource
from anystory_core.training.call import TrainingCall
from anystory_core.training.hosts import unet as diffusers_unet


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

    def call(
        self,
        latents: Tensor | None,
        present: Tensor,
        source: RouteSource,
        placed: int = 0,
        clip: Sequence[Candidates] = (),
    ) -> TrainingCall:
        """The first n rows of a pass read references (n,N,4,r,r) where ``source`` sends them, those
        that ``present`` (n,N) bool says are there; differentiable. Blocks agree on the places of
        all but the first ``placed`` rows, whose places were given. ``clip``: keys and values of
        CLIP tokens at every block; none when empty. Without ``latents`` there are tokens alone."""
        rows, count = present.shape
        features: list[Tensor] = []
        if latents is not None:
            features = [_spread(g, present) for g in self.features(latents[present])]
        conditions: list[SiteConditions] = []
        for site in self.sites:
            read: list[KeyValue | None] = [None] * count
            if features and site.index > 1:
                attn = self.unet.get_submodule(site.diffusers).attn1
                given = features[site.index - 2]
                pairs = zip(attn.to_k(given).unbind(1), attn.to_v(given).unbind(1), strict=True)
                read = [KeyValue(k, v) for k, v in pairs]
            tokens = clip[site.index - 1] if clip else Candidates([None] * (count + 1))
            conditions.append(SiteConditions(tokens, Candidates([*read, None])))
        biases = (*(0.0 if features else -math.inf,) * count, -math.inf)
        prepared = PreparedSubjects(
            tuple(conditions), source, (1.0,) * (count + 1), biases, agree=True
        )
        active, shown = (True,) * count, Shown(apart=tuple(range(placed)))
        return TrainingCall(
            prepared,
            Rows(tuple(range(rows))),
            active,
            self.sites,
            diffusers_unet.dense_attention,
            shown,
        )


def _spread(features: Tensor, present: Tensor) -> Tensor:
    """(M,G,d) of the M that are ``present`` (n,N) -> (n,N,G,d), zeros for the others."""
    spread = features.new_zeros(*present.shape, *features.shape[1:])
    spread[present] = features
    return spread
