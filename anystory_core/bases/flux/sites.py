"""The one table of FLUX's blocks.

A *site* is the l-th block in forward order, ``l = 1 ... 57``: the double blocks, then the single
ones. The same table gives the host's patch slots, the paths of the modules in ComfyUI and in
diffusers, and the numbers under which the weights of a block stand in a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..base import Site
from .config import FluxTransformerConfig

Kind = Literal["double", "single"]


@dataclass(frozen=True, kw_only=True)
class FluxSite(Site):
    """A block of FLUX: number ``number`` of its kind."""

    kind: Kind
    number: int

    @property
    def slot(self) -> tuple[str, int]:
        """ComfyUI's key in ``patches_replace["dit"]``."""
        return f"{self.kind}_block", self.number

    @property
    def host(self) -> str:
        """Path of the block in ComfyUI's Flux."""
        return f"{self.kind}_blocks.{self.number}"

    @property
    def diffusers(self) -> str:
        """Path of the block in diffusers' FluxTransformer2DModel."""
        prefix = "" if self.kind == "double" else "single_"
        return f"{prefix}transformer_blocks.{self.number}"

    @property
    def label(self) -> str:
        """Name for people, e.g. ``double 4``."""
        return f"{self.kind} {self.number}"

    @property
    def short_label(self) -> str:
        """As :attr:`label`, e.g. ``d4``."""
        return f"{self.kind[0]}{self.number}"


def build_sites(transformer: FluxTransformerConfig) -> tuple[FluxSite, ...]:
    """All sites in forward order: 57 for FLUX.1."""
    depths: tuple[tuple[Kind, int], ...] = (
        ("double", transformer.double_blocks),
        ("single", transformer.single_blocks),
    )
    blocks: list[tuple[Kind, int]] = []
    for kind, depth in depths:
        blocks.extend((kind, number) for number in range(depth))
    return tuple(
        FluxSite(
            index=index,
            kind=kind,
            number=number,
            channels=transformer.width,
            heads=transformer.heads,
            stride=transformer.patch_size,
        )
        for index, (kind, number) in enumerate(blocks, 1)
    )
