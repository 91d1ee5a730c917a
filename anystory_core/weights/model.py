"""Configuration -> modules: the composition root.

An :class:`AnyStoryModel` has any of the parts in :data:`PARTS`; a file without a router or
without a ReferenceNet is usable for what it has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..bases.sdxl.config import AnyStoryConfig
from ..bases.sdxl.reference_net import ReferenceNet
from ..bases.sdxl.sites import Site, build_sites
from ..errors import ConfigError
from ..injection.equations import KeyValue
from ..routing.router import Routers
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


class SubjectEncoder(nn.Module):
    """The two QFormers over one picture's CLIP states: subject tokens and routing feature."""

    def __init__(self, subject: QFormer | None, routing: QFormer | None) -> None:
        super().__init__()
        self.subject = subject
        self.routing = routing

    def forward(self, states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """CLIP states (V,S,W) -> tokens E (V,T,C) and routing features R (V,d_r)."""
        tokens = None if self.subject is None else self.subject(states)
        routing = None if self.routing is None else self.routing(states)[:, 0]
        return tokens, routing


class Projection(nn.Module):
    """Key and value maps of one block for subject features."""

    def __init__(self, inputs: int, width: int, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        kw: dict[str, Any] = {"bias": False, "dtype": dtype, "device": device}
        self.to_k = operations.Linear(inputs, width, **kw)
        self.to_v = operations.Linear(inputs, width, **kw)

    def forward(self, x: Tensor) -> KeyValue:
        """(R,T,inputs) -> keys and values (R,T,width)."""
        return KeyValue(self.to_k(x), self.to_v(x))


class ProjectionTable(nn.Module):
    """One :class:`Projection` per site, under the site's number."""

    def __init__(
        self, shapes: Sequence[tuple[int, int, int]], operations: Any, dtype: Any, device: Any
    ) -> None:
        super().__init__()
        for index, inputs, width in shapes:
            self.add_module(str(index), Projection(inputs, width, operations, dtype, device))

    def at(self, index: int) -> Projection:
        """The projection of block ``index``."""
        return cast(Projection, self.get_submodule(str(index)))


class Projections(nn.Module):
    """K and V maps for the CLIP tokens (blocks 1..L) and the reference features (2..L)."""

    def __init__(self, clip: ProjectionTable | None, reference: ProjectionTable | None) -> None:
        super().__init__()
        self.clip = clip
        self.reference = reference


@dataclass
class AnyStoryModel:
    """The modules of one weights file. ``fingerprint`` names its tensors; "" when never saved."""

    config: AnyStoryConfig
    sites: tuple[Site, ...]
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

    def qformer(part: str, shape: Any) -> QFormer | None:
        return QFormer(shape, input_dim=config.clip.width, **kw) if part in parts else None

    def table(part: str, shapes: list[tuple[int, int, int]]) -> ProjectionTable | None:
        return ProjectionTable(shapes, operations, dtype, device) if part in parts else None

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
            qformer("subject_encoder", config.subject_qformer),
            qformer("routing_encoder", config.routing_qformer),
        ),
        projections=Projections(
            table("clip_projections", clip), table("reference_projections", reference)
        ),
        reference_net=ReferenceNet(config, **kw) if "reference_net" in parts else None,
        routers=routers,
    )
