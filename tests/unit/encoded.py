"""A small model with every part, and what it encodes a subject from."""

from __future__ import annotations

import dataclasses

import torch

from anystory_core.bases.sdxl.config import AnyStoryConfig, ReferenceConfig, UNetConfig
from anystory_core.config import ClipVisionConfig, QFormerConfig
from anystory_core.subject.encoder import PictureStates
from anystory_core.subject.preprocess import Views, prepare_views
from anystory_core.weights.model import AnyStoryModel, build_model

CONFIG = AnyStoryConfig(
    name="test",
    unet=UNetConfig(
        model_channels=32, channel_mult=(1, 1), transformer_depth=(0, 1), middle_depth=1,
        num_res_blocks=1, head_dim=16, context_dim=8, adm_channels=1536 + 5,
    ),
    clip=ClipVisionConfig(width=8, layers=1, heads=1, intermediate=8, image_size=28),
    subject_qformer=QFormerConfig(queries=2, width=8, layers=1, heads=1, head_dim=8, output_dim=8),
    routing_qformer=QFormerConfig(queries=1, width=8, layers=1, heads=1, head_dim=8, output_dim=8),
    reference=ReferenceConfig(size=64, latent_scale=1.0),
)  # fmt: skip
READING = dataclasses.replace(  # its ReferenceNet reads the label
    CONFIG, reference=dataclasses.replace(CONFIG.reference, cross_attention=True)
)


def small_model(config: AnyStoryConfig) -> AnyStoryModel:
    """Random weights, the same every time."""
    torch.manual_seed(0)
    built = build_model(config)
    built.fingerprint = "weights-a"
    return built


def small_views(config: AnyStoryConfig, count: int = 2) -> Views:
    picture = torch.rand(count, 50, 40, 3, generator=torch.Generator().manual_seed(0))
    return prepare_views(picture, torch.ones(count, 50, 40), config)


def small_states(config: AnyStoryConfig, count: int = 2) -> PictureStates:
    """Random states of so many pictures."""
    tokens, width = config.clip.tokens, config.clip.width
    generator = torch.Generator().manual_seed(1)
    label = torch.randn(1, 3, config.unet.context_dim, generator=generator)
    return PictureStates(
        clip=torch.randn(count, tokens, width, generator=generator),
        background=torch.randn(1, tokens, width, generator=generator),
        latents=torch.randn(count, 4, 8, 8, generator=generator),
        label=label if config.reference.cross_attention else None,
        clip_fingerprint="clip-a",
    )
