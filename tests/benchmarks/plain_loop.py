"""The loop that one would write with diffusers for the same training: an IP-Adapter and a
ReferenceNet the usual way.

The base's U-Net frozen; beside its cross-attention one to the picture's tokens, which
``IPAdapterPlusImageProjection`` makes; a second U-Net, its trainable copy, reads the reference, and
what its blocks' self-attention reads is given to the first one's self-attention through K and V
maps of its own. One forward pass of it, mean squared error, AdamW.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from torch import Tensor, nn

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.sites import build_sites


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class WithReference(nn.Module):
    """Self-attention of a block that also reads the reference's states of the same block."""

    def __init__(self, width: int, heads: int, states: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self.heads, self.states, self.name = heads, states, name
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        seen = self.states[self.name]
        k = torch.cat((attn.to_k(hidden_states), self.to_k(seen)), dim=1)
        v = torch.cat((attn.to_v(hidden_states), self.to_v(seen)), dim=1)
        return attn.to_out[0](attention(attn.to_q(hidden_states), k, v, self.heads))


class WithPicture(nn.Module):
    """Cross-attention of a block, and beside it one to the picture's tokens."""

    def __init__(self, width: int, context: int, heads: int, states: dict[str, Tensor]) -> None:
        super().__init__()
        self.heads, self.states = heads, states
        self.to_k_ip = nn.Linear(context, width, bias=False)
        self.to_v_ip = nn.Linear(context, width, bias=False)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        q = attn.to_q(hidden_states)
        text = encoder_hidden_states
        out = attention(q, attn.to_k(text), attn.to_v(text), self.heads)
        tokens = self.states["picture"]
        out = out + attention(q, self.to_k_ip(tokens), self.to_v_ip(tokens), self.heads)
        return attn.to_out[0](out)


class PlainLoop(nn.Module):
    """One training step's forward pass."""

    def __init__(self, unet: Any, vae: Any, vision: Any, config: AnyStoryConfig) -> None:
        super().__init__()
        former = config.subject_qformer
        self._frozen = [unet, vae, vision]
        self.reference = copy.deepcopy(unet).requires_grad_(True)
        self.projection: Any = IPAdapterPlusImageProjection(
            embed_dims=config.clip.width, output_dims=former.output_dim,
            hidden_dims=former.width, depth=former.layers, dim_head=former.head_dim,
            heads=former.heads, num_queries=former.queries, ffn_ratio=former.ff_mult,
        )  # fmt: skip
        self.states: dict[str, Tensor] = {}
        self.maps = nn.ModuleList()
        processors: dict[str, Any] = {}
        for site in build_sites(config.unet):
            block = self.reference.get_submodule(site.diffusers)
            block.norm1.register_forward_hook(self._keep(site.diffusers))
            own = WithReference(site.channels, site.heads, self.states, site.diffusers)
            cross = WithPicture(site.channels, config.unet.context_dim, site.heads, self.states)
            self.maps.extend((own, cross))
            processors[f"{site.diffusers}.attn1.processor"] = own
            processors[f"{site.diffusers}.attn2.processor"] = cross
        unet.set_attn_processor(processors)

    def _keep(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            self.states[name] = out

        return hook

    def forward(
        self, noisy: Tensor, t: Tensor, text: Tensor, added: dict[str, Tensor], clip: Tensor,
        latents: Tensor, noise: Tensor,
    ) -> Tensor:  # fmt: skip
        unet, _, vision = self._frozen
        with torch.no_grad():
            seen = vision(clip, output_hidden_states=True).hidden_states[-2]
        self.states["picture"] = self.projection(seen)
        self.reference(latents, torch.zeros_like(t), text, added_cond_kwargs=added)
        found = unet(noisy, t, text, added_cond_kwargs=added).sample
        return nn.functional.mse_loss(found.float(), noise.float())
