"""A subject for FLUX from the host's networks."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import torch
from torch import Tensor

from ....anystory_core.bases.flux.config import FluxConfig
from ....anystory_core.errors import ModelMismatchError
from ....anystory_core.subject.flux import (
    FluxSubject,
    encode_flux_subject,
    flux_latents,
    prepare_flux_views,
)
from ....anystory_core.subject.label import clean_label
from ....anystory_core.weights.fingerprint import weights_fingerprint
from .. import tensors
from ..base import EncodeRequest
from ..managed import compute_dtype, load, release


def vision_states(clip_vision: Any, pixels: Tensor, config: FluxConfig) -> Tensor:
    """Last states (V,s*s,W) of normalised pixels (V,3,S,S), after the encoder's norm, past the
    host's own preprocessing. ModelMismatchError unless the encoder is the config's.

    (The host's norms have an epsilon of 1e-5 where SigLIP was trained with 1e-6: the states differ
    in the fourth digit from those that the authors' code sees.)"""
    found = _sizes(clip_vision)
    vision = config.vision
    wanted = (vision.width, vision.layers, vision.image_size)
    if found != wanted:
        raise ModelMismatchError(
            f"clip_vision: got SigLIP width, layers, picture size {found}, the AnyStory weights "
            f"expect {wanted}; load sigclip_vision_patch14_384"
        )
    mm.load_model_gpu(clip_vision.patcher)
    return clip_vision.model(pixel_values=pixels.to(clip_vision.load_device))[0].float()


def _sizes(clip_vision: Any) -> tuple[int, int, int] | None:
    """(width, layers, picture size) of a SigLIP tower; None for another kind of encoder."""
    tower = getattr(clip_vision.model, "vision_model", None)
    embeddings = getattr(tower, "embeddings", None)
    if embeddings is None or getattr(embeddings, "class_embedding", None) is not None:
        return None
    width = embeddings.position_embedding.weight.shape[-1]
    return width, len(tower.encoder.layers), clip_vision.image_size


def encode(request: EncodeRequest) -> tuple[FluxSubject, tuple[str, ...]]:
    """See :class:`..base.HostBase`."""
    anystory, clip_vision, advance = request.anystory, request.clip_vision, request.advance
    model, config = anystory.model, anystory.model.config
    views = prepare_flux_views(
        request.image,
        request.mask,
        config,
        invert_mask=request.invert_mask,
        mask_shows=request.mask_shows,
    )
    device = mm.get_torch_device()
    dtype = compute_dtype(device)
    with torch.inference_mode():
        states = vision_states(clip_vision, views.vision, config).to(device, dtype)
        advance(1)
        pictures = tensors.vae_latents(request.vae, tensors.vae_picture(views.vae))
        latents = flux_latents(config, pictures.float())
        advance(1)
        patchers = anystory.having("redux.subject", "redux.routing")
        load(patchers)
        try:
            subject = encode_flux_subject(
                model,
                views,
                states=states,
                latents=latents,
                label=clean_label(request.label),
                clip_fingerprint=weights_fingerprint(clip_vision.model),
                store=mm.unet_offload_device(),
            )
        finally:
            release(patchers)
    advance(1)
    return subject, views.notes
