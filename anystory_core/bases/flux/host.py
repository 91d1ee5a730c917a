"""What this code calls on the host's own ``Flux``, and the small steps that the host does inline.

Nothing of the host is imported: its modules are known by the names that they have had in every
version (its q and k norms, whose weights were renamed, are only called).

Axes: B rows, X tokens, d width, H heads, h width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]


class HeadAttention(Protocol):
    """Dense attention: q (B,H,Q,h), k and v (B,H,K,h) -> (B,Q,H*h). ``mask`` broadcasts to
    (B,H,Q,K); bool (True: may look) or additive."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor: ...


class Modulation(Protocol):
    """Shift, scale and gate from the conditioning vector, in this order."""

    lin: Layer


class HeadNorm(Protocol):
    """RMS norms of the heads."""

    query_norm: Layer
    key_norm: Layer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class SideAttention(Protocol):
    """The attention layers of one side of a double block."""

    qkv: Layer
    norm: HeadNorm
    proj: Layer


class DoubleBlock(Protocol):
    """``DoubleStreamBlock``."""

    img_mod: Modulation
    img_norm1: Layer
    img_attn: SideAttention
    img_norm2: Layer
    img_mlp: Sequence[Layer]
    txt_mod: Modulation
    txt_norm1: Layer
    txt_attn: SideAttention
    txt_norm2: Layer
    txt_mlp: Sequence[Layer]


class SingleBlock(Protocol):
    """``SingleStreamBlock``."""

    modulation: Modulation
    pre_norm: Layer
    linear1: Layer
    norm: HeadNorm
    mlp_act: Layer
    linear2: Layer


class Flux(Protocol):
    """The whole network."""

    params: Any
    hidden_size: int
    num_heads: int
    img_in: Layer
    txt_in: Layer
    time_in: Layer
    guidance_in: Layer
    vector_in: Layer | None
    pe_embedder: Layer
    double_blocks: Sequence[DoubleBlock]
    single_blocks: Sequence[SingleBlock]


def timestep_embedding(t: Tensor, width: int = 256) -> Tensor:
    """(B,) in [0,1] (or the guidance) -> (B,width) float32, cosines first."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = 1000 * t[:, None].float() * torch.exp(-math.log(10000) * steps / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def condition_vector(
    net: Flux, t: Tensor, guidance: Tensor | None, pooled: Tensor | None, like: Tensor
) -> Tensor:
    """``vec``: t (B,), guidance (B,) or None, pooled text (B,P) or None -> (B,d)."""
    vec = net.time_in(timestep_embedding(t).to(like.dtype))
    if net.params.guidance_embed and guidance is not None:
        vec = vec + net.guidance_in(timestep_embedding(guidance).to(like.dtype))
    if net.vector_in is not None:
        width: int = net.params.vec_in_dim
        if pooled is None:
            pooled = like.new_zeros(t.shape[0], width)
        vec = vec + net.vector_in(pooled[:, :width].to(like))
    return vec


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(1 + scale) x + shift``, x (B,X,d), the others (B,1,d)."""
    return torch.addcmul(shift, x, 1 + scale)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B,X,3d) -> q, k, v (B,H,X,h)."""
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (3,B,H,X,h)
    return q, k, v


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding: x (B,H,X,h), positions (B or 1,1,X,h/2,2,2) as ``pe_embedder`` gives."""
    pairs = x.to(positions.dtype).reshape(*x.shape[:-1], -1, 1, 2)  # (B,H,X,h/2,1,2)
    turned = positions[..., 0] * pairs[..., 0] + positions[..., 1] * pairs[..., 1]
    return turned.flatten(-2).type_as(x)


def finite(x: Tensor) -> Tensor:
    """The host's guard after a block: half precision overflows there."""
    if x.dtype == torch.float16:
        return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504)
    return x
