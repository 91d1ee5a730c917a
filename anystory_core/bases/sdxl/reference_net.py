"""ReferenceNet (paper Eq. 3, Table 1): features of a reference picture at every block.

The U-Net's own graph without cross-attention and with one more input channel, the subject mask. Its
parameter names are those of ComfyUI's ``UNetModel``, so a U-Net initialises it key by key. Only
``G^2 ... G^L`` are ever read, hence nothing after the last block's ``norm1`` is built unless
``full`` asks for it (to count Table 1's parameters, or to compare with a whole U-Net).

It sees a clean picture: timestep 0 and the zero label vector. Both are the same for every picture,
so the time embedding runs on one row and is broadcast.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from .config import AnyStoryConfig
from .sites import build_sites


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B,) -> (B,width), cosines first, as in the U-Net."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


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
                out = checkpoint(block, tokens, context, use_reentrant=False)
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


class ReferenceNet(nn.Module):
    """Latents and mask of V pictures -> ``G^2 ... G^L``.

    Raises ValueError when ``config.reference.cross_attention`` is set and no context is given.
    """

    def __init__(
        self,
        config: AnyStoryConfig,
        *,
        full: bool = False,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        unet = config.unet
        layers = Layers(operations, dtype, device, unet.norm_groups)
        self.model_channels = unet.model_channels
        self.adm_channels = unet.adm_channels
        self.recompute = False  # activation checkpointing, set by the trainer
        context_dim = unet.context_dim if config.reference.cross_attention else None
        last = build_sites(unet)[-1]
        time = unet.time_channels

        def embedding(inputs: int) -> nn.Sequential:
            return nn.Sequential(layers.linear(inputs, time), nn.SiLU(), layers.linear(time, time))

        def transformer(width: int, depth: int, *, tail: bool = True) -> SpatialTransformer:
            heads = width // unet.head_dim
            return SpatialTransformer(layers, width, heads, depth, context_dim, tail=tail)

        self.time_embed = embedding(unet.model_channels)
        self.label_emb = nn.Sequential(embedding(unet.adm_channels))

        width = unet.model_channels
        skips = [width]
        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([layers.conv(unet.in_channels + 1, width)])]
        )
        levels = list(enumerate(zip(unet.channel_mult, unet.transformer_depth, strict=True)))
        for level, (mult, depth) in levels:
            for _ in range(unet.num_res_blocks):
                outputs = mult * unet.model_channels
                block: list[nn.Module] = [ResBlock(layers, width, outputs, time)]
                width = outputs
                if depth:
                    block.append(transformer(width, depth))
                self.input_blocks.append(nn.ModuleList(block))
                skips.append(width)
            if level + 1 < len(unet.channel_mult):
                self.input_blocks.append(nn.ModuleList([Downsample(layers, width)]))
                skips.append(width)

        self.middle_block = nn.ModuleList(
            [
                ResBlock(layers, width, width, time),
                transformer(width, unet.middle_depth),
                ResBlock(layers, width, width, time),
            ]
        )

        self.output_blocks = nn.ModuleList()
        for level, (mult, depth) in reversed(levels):
            for layer in range(unet.num_res_blocks + 1):
                number = len(self.output_blocks)
                if not full and number > last.number:
                    return
                tail = full or number < last.number
                outputs = mult * unet.model_channels
                block = [ResBlock(layers, width + skips.pop(), outputs, time)]
                width = outputs
                if depth:
                    block.append(transformer(width, depth, tail=tail))
                if tail and level and layer == unet.num_res_blocks:
                    block.append(Upsample(layers, width))
                self.output_blocks.append(nn.ModuleList(block))
        if full:
            self.out = nn.Sequential(
                layers.group_norm(width), nn.SiLU(), layers.conv(width, unet.in_channels)
            )

    def forward(self, latents: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        """latents (V,in_channels+1,h,w) at U-Net scale, mask channel last and in [0,1] ->
        L-1 features (V, h_l*w_l, d_l). ``context`` (V,S,context_dim) only with cross-attention."""
        emb = self._time_embedding(latents)
        features: list[Tensor] = []
        skips: list[Tensor] = []
        x = latents
        for block in self.input_blocks:
            x = self._run(block, x, emb, context, features)
            skips.append(x)
        x = self._run(self.middle_block, x, emb, context, features)
        for block in self.output_blocks:
            x = torch.cat((x, skips.pop()), dim=1)
            size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = self._run(block, x, emb, context, features, (size[0], size[1]))
        return tuple(features[1:])

    def _time_embedding(self, latents: Tensor) -> Tensor:
        """(1, time_channels): timestep 0 plus the zero label, the same for every picture."""
        zero = latents.new_zeros(1)
        time = timestep_embedding(zero, self.model_channels).to(latents.dtype)
        label = latents.new_zeros(1, self.adm_channels)
        return self.time_embed(time) + self.label_emb(label)

    def _run(
        self,
        block: nn.Module,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None,
        features: list[Tensor],
        size: tuple[int, int] = (0, 0),
    ) -> Tensor:
        for layer in block.children():
            if isinstance(layer, ResBlock):
                if self.recompute:
                    x = cast(Tensor, checkpoint(layer, x, emb, use_reentrant=False))
                else:
                    x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, features, self.recompute)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x
