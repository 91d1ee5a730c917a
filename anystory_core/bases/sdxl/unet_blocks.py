"""The parts of SDXL's U-Net that the ReferenceNet is built of (paper Table 1).

Their parameter names are those of ComfyUI's ``UNetModel``. Axes: V pictures, C channels, h and w
the latent's height and width, d a block's width, E the time embedding's.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as recomputation


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B,) -> (B,width), cosines first, as in the U-Net."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def recomputed(layer: nn.Module, *inputs: Tensor | None) -> Any:
    """``layer(*inputs)``, run again in the backward pass instead of kept for it."""
    return cast(Any, recomputation).checkpoint(layer, *inputs, use_reentrant=False)


class Layers:
    """Layer factory: the injected namespace with dtype, device and group count bound once."""

    def __init__(self, operations: Any, dtype: Any, device: Any, norm_groups: int) -> None:
        self.operations = operations
        self.kw: dict[str, Any] = {"dtype": dtype, "device": device}
        self.norm_groups = norm_groups

    def linear(self, inputs: int, outputs: int, *, bias: bool = True) -> nn.Module:
        return self.operations.Linear(inputs, outputs, bias=bias, **self.kw)

    def conv(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Module:
        return self.operations.Conv2d(
            inputs, outputs, size, stride=stride, padding=size // 2, **self.kw
        )

    def group_norm(self, channels: int, eps: float = 1e-5) -> nn.Module:
        return self.operations.GroupNorm(self.norm_groups, channels, eps=eps, **self.kw)

    def layer_norm(self, width: int) -> nn.Module:
        return self.operations.LayerNorm(width, **self.kw)


class ResBlock(nn.Module):
    """Residual convolution block with a time embedding."""

    def __init__(self, layers: Layers, inputs: int, outputs: int, time_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            layers.group_norm(inputs), nn.SiLU(), layers.conv(inputs, outputs)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), layers.linear(time_channels, outputs))
        self.out_layers = nn.Sequential(
            layers.group_norm(outputs), nn.SiLU(), nn.Dropout(0.0), layers.conv(outputs, outputs)
        )
        self.skip_connection = (
            nn.Identity() if inputs == outputs else layers.conv(inputs, outputs, size=1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (V,C,h,w), emb (1,E) -> (V,C',h,w)."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Multi-head attention with the projections' public names."""

    def __init__(self, layers: Layers, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = layers.linear(width, width, bias=False)
        self.to_k = layers.linear(context_dim, width, bias=False)
        self.to_v = layers.linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(layers.linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Gated linear unit with GELU, under the U-Net's parameter name ``proj``."""

    def __init__(self, layers: Layers, width: int, inner: int) -> None:
        super().__init__()
        self.proj = layers.linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * nn.functional.gelu(gate)


class FeedForward(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, layers: Layers, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(layers, width, 4 * width), nn.Dropout(0.0), layers.linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """One site. ``tail=False`` builds only ``norm1``: the last block is read, never left."""

    def __init__(
        self, layers: Layers, width: int, heads: int, context_dim: int | None, *, tail: bool
    ) -> None:
        super().__init__()
        self.norm1 = layers.layer_norm(width)
        self.tail = tail
        if not tail:
            return
        self.attn1 = Attention(layers, width, heads, width)
        self.attn2 = self.norm2 = None
        if context_dim is not None:
            self.attn2 = Attention(layers, width, heads, context_dim)
            self.norm2 = layers.layer_norm(width)
        self.norm3 = layers.layer_norm(width)
        self.ff = FeedForward(layers, width)

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (V,hw,d) -> (x after the block, its ``norm1`` output: the reference feature)."""
        feature = self.norm1(x)
        if not self.tail:
            return x, feature
        x = x + self.attn1(feature, feature)
        if self.attn2 is not None and self.norm2 is not None:
            if context is None:
                raise ValueError("ReferenceNet with cross-attention needs `context` (V,S,C)")
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x)), feature


class SpatialTransformer(nn.Module):
    """A stack of sites over an image; appends each site's feature to ``features``."""

    def __init__(
        self,
        layers: Layers,
        width: int,
        heads: int,
        depth: int,
        context_dim: int | None,
        *,
        tail: bool = True,
    ) -> None:
        super().__init__()
        self.tail = tail
        self.norm = layers.group_norm(width, eps=1e-6)
        self.proj_in = layers.linear(width, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(layers, width, heads, context_dim, tail=tail or i + 1 < depth)
            for i in range(depth)
        )
        if tail:
            self.proj_out = layers.linear(width, width)

    def forward(
        self, x: Tensor, context: Tensor | None, features: list[Tensor], recompute: bool
    ) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (V,hw,d)
        for block in self.transformer_blocks:
            if recompute:
                out = recomputed(block, tokens, context)
                tokens, feature = cast("tuple[Tensor, Tensor]", out)
            else:
                tokens, feature = block(tokens, context)
            features.append(feature)
        if not self.tail:
            return x
        tokens = self.proj_out(tokens)
        return x + tokens.transpose(1, 2).unflatten(2, (height, width))


class Downsample(nn.Module):
    """Strided convolution, under the U-Net's parameter name ``op``."""

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.op = layers.conv(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour resize to the skip connection's size, then a convolution."""

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.conv = layers.conv(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(nn.functional.interpolate(x, size=size, mode="nearest"))
