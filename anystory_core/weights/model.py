"""Configuration -> modules: the composition root.

An :class:`AnyStoryModel` has any of the parts in :data:`PARTS`; a file without a router or
without a ReferenceNet is usable for what it has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.sdxl.config import AnyStoryConfig
from ..bases.sdxl.reference_net import ReferenceNet
from ..bases.sdxl.sites import UNetSite, build_sites
from ..config import ClipBranchConfig, GroundingConfig, QFormerConfig, References
from ..errors import ConfigError
from ..injection.projections import Projections, ProjectionTable
from ..routing.router import Routers
from ..subject.encoder import SubjectEncoder
from ..subject.grounding import GroundedQFormer
from ..subject.qformer import QFormer

# Part -> prefix of its keys in a weights file.
PARTS = {
    "subject_encoder": "encoder.subject.",
    "routing_encoder": "encoder.routing.",
    "reference_net": "reference_net.",
    "clip_projections": "projections.clip.",
    "reference_projections": "projections.reference.",
    "routers": "routers.",
}


@dataclass
class AnyStoryModel:
    """The modules of one weights file. ``fingerprint`` names its tensors; "" when never saved."""

    config: AnyStoryConfig
    sites: tuple[UNetSite, ...]
    encoder: SubjectEncoder
    projections: Projections
    reference_net: ReferenceNet | None
    routers: Routers | None
    fingerprint: str = ""

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(prefix without the dot, module) of all that is there."""
        yield "encoder", self.encoder
        yield "projections", self.projections
        if self.reference_net is not None:
            yield "reference_net", self.reference_net
        if self.routers is not None:
            yield "routers", self.routers

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors under their names in a weights file."""
        return {
            f"{prefix}.{key}": tensor
            for prefix, module in self.modules()
            for key, tensor in module.state_dict().items()
        }

    @property
    def clip_branch(self) -> ClipBranchConfig:
        """How the CLIP branch was trained."""
        return self.config.clip_branch

    @property
    def references(self) -> References:
        """Which reference features act, unless the user says otherwise."""
        return self.config.references

    @property
    def decoder_from(self) -> int:
        """Number of the first block of the U-Net's decoder."""
        return next(site.index for site in self.sites if site.part == "output")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that are there, in the order of :data:`PARTS`."""
        there = {
            "subject_encoder": self.encoder.subject,
            "routing_encoder": self.encoder.routing,
            "reference_net": self.reference_net,
            "clip_projections": self.projections.clip,
            "reference_projections": self.projections.reference,
            "routers": self.routers,
        }
        return tuple(name for name in PARTS if there[name] is not None)


def build_model(
    config: AnyStoryConfig,
    parts: Collection[str] = tuple(PARTS),
    *,
    operations: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> AnyStoryModel:
    """Build the named parts with fresh weights. Unknown part names are a ConfigError."""
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ConfigError(f"parts: unknown {unknown}, expected among {list(PARTS)}")
    kw: dict[str, Any] = {"operations": operations, "dtype": dtype, "device": device}
    sites = build_sites(config.unet)

    def qformer(
        part: str, shape: QFormerConfig, grounding: GroundingConfig | None = None
    ) -> QFormer | None:
        if part not in parts:
            return None
        if grounding is None:
            return QFormer(shape, input_dim=config.clip.width, **kw)
        return GroundedQFormer(shape, grounding, input_dim=config.clip.width, **kw)

    def table(
        part: str, shapes: list[tuple[int, int, int]], gate: bool = False
    ) -> ProjectionTable | None:
        if part not in parts:
            return None
        return ProjectionTable(shapes, operations, dtype, device, gate=gate)

    context = config.unet.context_dim
    clip = [(site.index, context, site.channels) for site in sites]
    reference = [(site.index, site.channels, site.channels) for site in sites[1:]]
    routers = None
    if "routers" in parts:
        routers = Routers(config.router, sites, routing_dim=config.routing_dim, **kw)
    return AnyStoryModel(
        config=config,
        sites=sites,
        encoder=SubjectEncoder(
            qformer("subject_encoder", config.subject_qformer, config.clip_branch.grounding),
            qformer("routing_encoder", config.routing_qformer),
        ),
        projections=Projections(
            table("clip_projections", clip, config.clip_branch.gate),
            table("reference_projections", reference),
        ),
        reference_net=ReferenceNet(config, **kw) if "reference_net" in parts else None,
        routers=routers,
    )
