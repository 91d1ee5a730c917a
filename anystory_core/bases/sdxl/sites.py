"""The one table of the U-Net's transformer blocks.

A *site* is the l-th transformer block in forward order, ``l = 1 ... L``. The same table gives the
patch slots of ComfyUI, the module paths of diffusers, the key names of the weights and the numbers
of the public IP-Adapter files, so a block's name is never typed twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..base import Site
from .config import UNetConfig

_SHORT = {"input": "in", "middle": "mid", "output": "out"}


@dataclass(frozen=True, kw_only=True)
class UNetSite(Site):
    """A transformer block of an SDXL-like U-Net."""

    part: str  # ComfyUI: "input", "middle" or "output" ...
    number: int  # ... its number there ...
    block_index: int  # ... and the position inside the SpatialTransformer
    diffusers: str  # path of the BasicTransformerBlock in UNet2DConditionModel
    ip_adapter: int  # the block's number in a public `ip_adapter.N` file

    @property
    def ldm(self) -> str:
        """Path of the BasicTransformerBlock in ComfyUI's UNetModel and in our ReferenceNet."""
        if self.part == "middle":
            return f"middle_block.1.transformer_blocks.{self.block_index}"
        return f"{self.part}_blocks.{self.number}.1.transformer_blocks.{self.block_index}"

    @property
    def label(self) -> str:
        """Name for people, e.g. ``input 4.1``."""
        return f"{self.part} {self._place}"

    @property
    def short_label(self) -> str:
        """As :attr:`label`, e.g. ``in 4.1``."""
        return f"{_SHORT[self.part]} {self._place}"

    @property
    def _place(self) -> str:
        return (
            f"{self.block_index}" if self.part == "middle" else f"{self.number}.{self.block_index}"
        )


def build_sites(unet: UNetConfig) -> tuple[UNetSite, ...]:
    """All sites of a U-Net in forward order: 70 for SDXL, 16 for the mini model."""
    levels = len(unet.channel_mult)
    layers: list[tuple[str, int, int, int, str]] = []  # part, number, level, depth, diffusers path

    number = 1  # input block 0 is the first convolution
    for level in range(levels):
        for layer in range(unet.num_res_blocks):
            path = f"down_blocks.{level}.attentions.{layer}"
            layers.append(("input", number, level, unet.transformer_depth[level], path))
            number += 1
        number += 1  # the downsampling block

    layers.append(("middle", 0, levels - 1, unet.middle_depth, "mid_block.attentions.0"))

    number = 0
    for step, level in enumerate(reversed(range(levels))):
        for layer in range(unet.num_res_blocks + 1):
            path = f"up_blocks.{step}.attentions.{layer}"
            layers.append(("output", number, level, unet.transformer_depth[level], path))
            number += 1

    sites: list[UNetSite] = []
    for part, number, level, depth, path in layers:
        for block_index in range(depth):
            channels = unet.model_channels * unet.channel_mult[level]
            sites.append(
                UNetSite(
                    index=len(sites) + 1,
                    part=part,
                    number=number,
                    block_index=block_index,
                    channels=channels,
                    heads=channels // unet.head_dim,
                    stride=2**level,
                    diffusers=f"{path}.transformer_blocks.{block_index}",
                    ip_adapter=0,
                )
            )
    return _number_like_ip_adapter(sites)


def _number_like_ip_adapter(sites: list[UNetSite]) -> tuple[UNetSite, ...]:
    """Fill in ``ip_adapter``: public files count all attention layers, self-attention included, in
    the order in which diffusers names them: down, up, middle. Cross-attention gets the odd ones."""
    order = sorted(sites, key=lambda s: ("input", "output", "middle").index(s.part))
    numbers = {site.index: 2 * place + 1 for place, site in enumerate(order)}
    return tuple(replace(site, ip_adapter=numbers[site.index]) for site in sites)
