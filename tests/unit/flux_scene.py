"""Random subjects and one call of a tiny FLUX: ours, and what the naive transcription gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import flux_naive
import torch
from flux_net import AXES, POOLED, Net, attention, shake
from torch import Tensor

from anystory_core.bases.flux.attention import Layout
from anystory_core.bases.flux.call import Concepts, FluxCall, RowGroup
from anystory_core.bases.flux.config import (
    BranchConfig,
    FluxConfig,
    FluxReferenceConfig,
    FluxTransformerConfig,
    ReduxConfig,
    SiglipConfig,
)
from anystory_core.bases.flux.model import FluxModel, build_model
from anystory_core.bases.flux.reference import References, reference_pass
from anystory_core.bases.flux.router import Router

CONFIG = FluxConfig(
    name="tiny",
    transformer=FluxTransformerConfig(
        width=32, heads=2, double_blocks=2, single_blocks=3, context_dim=20, channels=4
    ),
    vision=SiglipConfig(width=12, layers=1, image_size=56),
    redux=ReduxConfig(subject_grid=2, routing_grid=1, rank=3),
    branches=BranchConfig(reference_rank=4, router_rank=3, routing_map_rank=3),
    reference=FluxReferenceConfig(size=64),
)
BLOCKS = CONFIG.transformer.double_blocks + CONFIG.transformer.single_blocks


def tiny_model(seed: int = 0) -> FluxModel:
    """All parts with random weights."""
    model = build_model(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    for _, module in model.modules():
        shake(module, generator)
        module.requires_grad_(False)
    return model


def tiny_net(seed: int = 1) -> Net:
    net = Net(CONFIG.transformer)
    shake(net, torch.Generator().manual_seed(seed))
    return net.requires_grad_(False)


def naive_of(net: Any, model: FluxModel) -> flux_naive.Flux:
    streams = (model.reference_branches, model.router_branches, model.routing_maps)
    reference, router, maps = (stream.state_dict() for stream in streams if stream is not None)
    return flux_naive.Flux(
        net.state_dict(),
        reference,
        router,
        maps,
        heads=CONFIG.transformer.heads,
        doubles=CONFIG.transformer.double_blocks,
        singles=CONFIG.transformer.single_blocks,
        axes=AXES,
    )


@dataclass
class Subject:
    """Random tensors of one subject from some pictures of it."""

    concept: Tensor | None
    routing: Tensor
    latents: Tensor  # (V,C,s,s)
    keep: Tensor  # (V,G) bool
    gamma: float


def subject(generator: torch.Generator, views: int, *, concept: bool, gamma: float) -> Subject:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width, grid = CONFIG.transformer.context_dim, CONFIG.reference_grid
    side = grid * CONFIG.transformer.patch_size
    keep = torch.rand(views, grid * grid, generator=generator) < 0.6
    keep[:, 0] = True
    tokens = normal(4 * views, width)
    tokens[torch.rand(4 * views, generator=generator) < 0.4] = 0  # places outside of the mask
    return Subject(
        tokens if concept else None,
        normal(views, width),
        normal(views, CONFIG.transformer.channels, side, side),
        keep,
        gamma,
    )


def packed(latents: Tensor) -> Tensor:
    """(V,C,h,w) -> (V,h/2*w/2,4C), written with loops."""
    views, _, height, width = latents.shape
    rows = [
        latents[v, :, y : y + 2, x : x + 2].flatten()
        for v in range(views)
        for y in range(0, height, 2)
        for x in range(0, width, 2)
    ]
    return torch.stack(rows).reshape(views, -1, rows[0].shape[0])


def people(subjects: list[Subject]) -> list[flux_naive.Person]:
    return [
        flux_naive.Person(
            s.concept,
            s.routing,
            None if s.gamma == -math.inf else packed(s.latents),
            s.keep,
            s.gamma,
        )
        for s in subjects
    ]


def references(
    net: Any, model: FluxModel, subjects: list[Subject], guidance: Tensor, pooled: Tensor
) -> References:
    assert model.reference_branches is not None
    return reference_pass(
        net,
        model.reference_branches,
        [s.latents if s.gamma > -math.inf else s.latents[:0] for s in subjects],
        [s.keep if s.gamma > -math.inf else s.keep[:0] for s in subjects],
        guidance=guidance,
        pooled=pooled,
        like=pooled,
        attention=attention,
    )


def router(model: FluxModel, subjects: list[Subject]) -> Router:
    assert model.router_branches is not None and model.routing_maps is not None
    tokens = torch.cat([s.routing for s in subjects])[None]
    lengths = tuple(s.routing.shape[0] for s in subjects)
    return Router(model.router_branches, model.routing_maps, tokens, lengths)


def call_of(
    model: FluxModel,
    subjects: list[Subject],
    text: int,
    grid: tuple[int, int],
    groups: tuple[RowGroup, ...],
    **kw: Any,
) -> tuple[FluxCall, Concepts]:
    concepts = Concepts.merged([s.concept for s in subjects])
    call = FluxCall(
        model.sites,
        Layout(text, concepts.lengths, grid, concepts.repeats),
        groups,
        tuple(s.gamma for s in subjects),
        attention,
        attention,
        **kw,
    )
    return call, concepts


def inputs(generator: torch.Generator, rows: int, text: int, grid: tuple[int, int]) -> Any:
    """tokens (B,M,4C), t, context, pooled, guidance."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = CONFIG.transformer
    return (
        normal(rows, grid[0] * grid[1], sizes.token_width),
        torch.rand(rows, generator=generator, dtype=torch.float64),
        normal(rows, text, sizes.context_dim),
        normal(rows, POOLED),
        torch.full((rows,), 3.5, dtype=torch.float64),
    )


def tokens_of(latent: Tensor) -> Tensor:
    """(C,h,w) -> (M,4C); an odd side is filled from its other end, as the host does."""
    height, width = latent.shape[1:]
    latent = torch.cat((latent, latent[:, : height % 2]), dim=1)
    latent = torch.cat((latent, latent[:, :, : width % 2]), dim=2)
    return packed(latent[None])[0]


def latent_of(tokens: Tensor, height: int, width: int) -> Tensor:
    """The way back, cut to size."""
    rows, columns = -(-height // 2), -(-width // 2)
    image = tokens.reshape(rows, columns, -1, 2, 2).permute(2, 0, 3, 1, 4)
    return image.reshape(image.shape[0], 2 * rows, 2 * columns)[:, :height, :width]
