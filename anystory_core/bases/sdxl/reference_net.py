"""ReferenceNet (paper Eq. 3, Table 1): features of a reference picture at every block.

The U-Net's own graph without cross-attention and with one more input channel, the subject mask. Its
parameter names are those of ComfyUI's ``UNetModel``, so a U-Net initialises it key by key. Only
``G^2 ... G^L`` are ever read, hence nothing after the last block's ``norm1`` is built unless
``full`` asks for it (to count Table 1's parameters, or to compare with a whole U-Net).

It sees a clean picture: timestep 0 and the zero label vector. Both are the same for every picture,
so the time embedding runs on one row and is broadcast.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import AnyStoryConfig
from .sites import build_sites
from .unet_blocks import (
    Downsample,
    Layers,
    ResBlock,
    SpatialTransformer,
    Upsample,
    recomputed,
    timestep_embedding,
)


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
                x = cast(Tensor, recomputed(layer, x, emb)) if self.recompute else layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, features, self.recompute)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x
