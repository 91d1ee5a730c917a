"""What the base learns besides pictures of captions: to look things up by self-attention.

Stage 1 trains on a frozen base, and what it adds is found by the base's own queries. SDXL's have
learned from its many pictures to find the other eye, the next window, the same thing again; the
queries of a base that has seen little but captions find nothing (measured: of two bases alike, what
references lowered Eq. 1 by was next to nothing). So the base is also shown a reference. Its own
weights read it, as the ReferenceNet that begins from them will: at timestep 0, without text, by
:class:`~anystory_core.reference_net.ReferenceNet` itself. The queries of the subject's place attend
to the result beside their own keys (Eq. 6 with K~ = K and V~ = V).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from ..config import AnyStoryConfig
from ..reference_net import ReferenceNet
from ..sites import Site, build_sites
from ..training.diffusers_unet import dense_attention
from ..training.names import ldm_to_diffusers


@dataclass
class Page:
    """What is read: features G^2..G^L of the first n rows, and where: ``region`` (n,h,w) on the
    latent's grid, at least 0.5 inside."""

    features: Sequence[Tensor]
    region: Tensor
    _biases: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def bias(self, tokens: int, read: int) -> Tensor:
        """(n,tokens,tokens+read): 0 where a token may look, -inf at references outside."""
        if tokens not in self._biases:
            height, width = self.region.shape[-2:]
            shrink = round((height * width / tokens) ** 0.5)
            share = functional.avg_pool2d(self.region[:, None], shrink).flatten(2).movedim(1, -1)
            outside = torch.where(share >= 0.5, 0.0, -torch.inf)
            own = outside.new_zeros(len(outside), tokens, tokens)
            self._biases[tokens] = torch.cat((own, outside.expand(-1, -1, read)), dim=-1)
        return self._biases[tokens]


@dataclass
class Book:
    """The page that all processors look at; None while nothing is read."""

    page: Page | None = None


class ReadingAttention:
    """attn1 of one site."""

    def __init__(self, site: Site, book: Book) -> None:
        self.site, self.book = site, book

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        q, k, v = (f(hidden_states) for f in (attn.to_q, attn.to_k, attn.to_v))
        heads, page = self.site.heads, self.book.page
        if page is None or self.site.index == 1:
            return attn.to_out[0](dense_attention(q, k, v, heads))
        read = page.features[self.site.index - 2]
        n = len(read)
        keys = torch.cat((k[:n], attn.to_k(read)), dim=1)
        values = torch.cat((v[:n], attn.to_v(read)), dim=1)
        bias = page.bias(q.shape[1], read.shape[1]).to(q.dtype)
        rows = [dense_attention(q[:n], keys, values, heads, bias)]
        if n < len(q):
            rows.append(dense_attention(q[n:], k[n:], v[n:], heads))
        return attn.to_out[0](torch.cat(rows))


class Reader:
    """Reads references with a diffusers U-Net's own weights."""

    def __init__(self, unet: Any, config: AnyStoryConfig) -> None:
        self.unet, self.book = unet, Book()
        self.net = ReferenceNet(config, device="meta")
        table = ldm_to_diffusers(config)
        self._names = {ours: table[ours] for ours in self.net.state_dict()}
        sites = {site.diffusers: site for site in build_sites(config.unet)}
        processors = dict(unet.attn_processors)
        for path, site in sites.items():
            processors[f"{path}.attn1.processor"] = ReadingAttention(site, self.book)
        unet.set_attn_processor(processors)

    def read(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Features G^2..G^L of reference latents (n,4,r,r). The mask's channel has no weight."""
        weights = dict(self.unet.named_parameters())
        tied = {ours: weights[theirs] for ours, theirs in self._names.items()}
        first = "input_blocks.0.0.weight"
        tied[first] = functional.pad(tied[first], (0, 0, 0, 0, 0, 1))
        return functional_call(self.net, tied, (functional.pad(latents, (0, 0, 0, 0, 0, 1)),))
