"""diffusers' ``UNet2DConditionModel`` as a host: attention processors that call the conditioner.

The processors hold a :class:`Slot`, into which each forward pass puts its
:class:`~anystory_core.injection.call.Call`. With an empty slot they are plain attention.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...bases.sdxl.sites import UNetSite
from ...injection.call import Call
from ...injection.matched import ReferencePass
from ...routing.grids import Grid


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    """(B,Q,D), (B,K,D), (B,K,D) -> (B,Q,D) through torch's scaled dot product attention. ``mask``
    (1 or B,Q,K): bool, where a key is seen, or what is added to its logits; a query that sees no
    key gets zeros. On a CPU what needs gradients goes without torch's own: its plain kernel spends
    as long on looking for such queries as on the products."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    if not (q.requires_grad and q.device.type == "cpu"):
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    blind = None
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = scores.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        blind = mask.amax(dim=-1, keepdim=True) == -torch.inf
        scores = scores + mask.masked_fill(blind, 0.0)  # a softmax of nothing but -inf is NaN
    with torch.autocast("cpu", enabled=False):  # it would widen them
        weights = scores.softmax(dim=-1)
    out = torch.matmul(weights, v)
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return out.transpose(1, 2).flatten(2)


@contextmanager
def attention_kernels(device: torch.device) -> Generator[None, None, None]:
    """What attention may run on in a training step. On a CPU the fused kernel's backward pass takes
    2 to 4 times the plain one's at small sizes, and half precision is kept: widened products of
    256 tokens took twice the time. Elsewhere torch chooses."""
    if device.type != "cpu":
        yield
        return
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


@dataclass
class Slot:
    """The call being served, and the token grid of each running Transformer2DModel."""

    call: Call | ReferencePass | None = None
    grids: dict[str, Grid] = field(default_factory=dict[str, Grid])


class SelfAttention:
    """attn1 of one site."""

    def __init__(self, site: UNetSite, slot: Slot) -> None:
        self.site, self.slot = site, slot

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        q, k, v = (f(hidden_states) for f in (attn.to_q, attn.to_k, attn.to_v))
        call, out = self.slot.call, None
        if call is not None:
            grid = self.slot.grids[_transformer(self.site)]
            out = call.self_attention(self.site.index, q, k, v, grid)
        if out is None:
            out = dense_attention(q, k, v, self.site.heads)
        return attn.to_out[0](out)


class CrossAttention:
    """attn2 of one site: its input is ``norm2``'s output, which the router reads."""

    def __init__(self, site: UNetSite, slot: Slot) -> None:
        self.site, self.slot = site, slot

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        call = self.slot.call
        if call is not None:
            grid = self.slot.grids[_transformer(self.site)]
            call.begin_cross_attention(self.site.index, hidden_states, grid)
        q = attn.to_q(hidden_states)
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        out = dense_attention(q, k, v, self.site.heads)
        if call is not None:
            out = call.cross_attention(self.site.index, q, out)
        return attn.to_out[0](out)


def _transformer(site: UNetSite) -> str:
    """Path of the Transformer2DModel that holds the site's block."""
    return site.diffusers.split(".transformer_blocks.")[0]


def install(unet: Any, sites: Sequence[UNetSite]) -> Slot:
    """Put our processors on every site of a diffusers U-Net; returns the slot they share."""
    slot = Slot()
    processors: dict[str, Any] = {}
    for site in sites:
        processors[f"{site.diffusers}.attn1.processor"] = SelfAttention(site, slot)
        processors[f"{site.diffusers}.attn2.processor"] = CrossAttention(site, slot)
    unet.set_attn_processor(processors)
    for path in dict.fromkeys(_transformer(site) for site in sites):
        unet.get_submodule(path).register_forward_pre_hook(_grid_hook(slot, path))
    return slot


def _grid_hook(slot: Slot, path: str) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        height, width = args[0].shape[-2:]
        slot.grids[path] = (int(height), int(width))

    return hook


@dataclass(frozen=True)
class UNetInputs:
    """What an SDXL U-Net reads: noised latents z_t (B,4,h,w), timesteps (B), the captions' states
    text (B,S,C) and pooled (B,P), and time_ids (B,6): original size, crop corner, target size."""

    latents: Tensor
    timesteps: Tensor
    text: Tensor
    pooled: Tensor
    time_ids: Tensor


def predict(unet: Any, slot: Slot, call: Call | ReferencePass | None, inputs: UNetInputs) -> Tensor:
    """One forward pass with ``call`` in the slot: what the U-Net predicts, (B,4,h,w).

    The slot keeps the call, because a checkpointed block runs again in the backward pass."""
    slot.call = call
    added = {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids}
    out = unet(inputs.latents, inputs.timesteps, inputs.text, added_cond_kwargs=added)
    return out.sample


def time_ids(height: int, width: int, batch: int, device: torch.device) -> Tensor:
    """SDXL's size conditioning (B,6) of whole pictures."""
    row = [height, width, 0, 0, height, width]
    return torch.tensor([row] * batch, dtype=torch.float32, device=device)
