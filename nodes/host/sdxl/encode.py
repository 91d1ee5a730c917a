"""A subject for SDXL from the host's networks."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import torch
from torch import Tensor

from ....anystory_core.bases.sdxl.config import AnyStoryConfig
from ....anystory_core.errors import ModelMismatchError
from ....anystory_core.subject.encoder import (
    PictureStates,
    encode_subject,
    reference_latents,
    reference_memory,
)
from ....anystory_core.subject.label import clean_label
from ....anystory_core.subject.preprocess import Views, prepare_views, zero_clip
from ....anystory_core.subject.subject import Subject
from ....anystory_core.weights.fingerprint import weights_fingerprint
from .. import tensors
from ..base import EncodeRequest
from ..managed import ManagedAnyStory, compute_dtype, fitting, load, number_types, release
from ..texts import encode_label, encode_phrase, encode_pooled


def clip_states(clip_vision: Any, pixels: Tensor, config: AnyStoryConfig) -> Tensor:
    """Penultimate states (V,S,W) of normalised pixels (V,3,S,S), past the host's own preprocessing
    (which rounds to 8 bits and crops). ModelMismatchError unless the encoder is the config's."""
    found = _clip_sizes(clip_vision)
    wanted = (config.clip.width, config.clip.layers, config.clip.image_size)
    if found != wanted:
        raise ModelMismatchError(
            f"clip_vision: got width, layers, picture size {found}, the AnyStory weights expect "
            f"{wanted}; load the CLIP vision model that they were trained with"
        )
    mm.load_model_gpu(clip_vision.patcher)
    out = clip_vision.model(pixel_values=pixels.to(clip_vision.load_device), intermediate_output=-2)
    return out[1].float()


def _clip_sizes(clip_vision: Any) -> tuple[int, int, int] | None:
    """(width, layers, picture size) of a CLIP vision tower; None for another kind of encoder."""
    tower = getattr(clip_vision.model, "vision_model", None)
    embeddings = getattr(tower, "embeddings", None)
    if getattr(embeddings, "class_embedding", None) is None:  # SigLIP's is None
        return None
    layers = len(tower.encoder.layers)
    return embeddings.class_embedding.shape[-1], layers, clip_vision.image_size


def encode(request: EncodeRequest) -> tuple[Subject, tuple[str, ...]]:
    """See :class:`..base.HostBase`."""
    anystory, clip_vision, advance = request.anystory, request.clip_vision, request.advance
    label, clip = request.label, request.clip
    model, config = anystory.model, anystory.model.config
    views = prepare_views(
        request.image,
        request.mask,
        config,
        invert_mask=request.invert_mask,
        mask_shows=request.mask_shows,
    )
    device = mm.get_torch_device()
    dtype = compute_dtype(device)
    with torch.inference_mode():
        clip_out = background = label_out = pooled = phrase = None
        if "encoder" in anystory.patchers:
            clip_out = clip_states(clip_vision, views.clip, config).to(device, dtype)
            background = clip_states(clip_vision, zero_clip(config), config).to(device, dtype)
            grounding = config.clip_branch.grounding
            if grounding is not None and clip is not None and label.strip():
                phrase = encode_phrase(clip, clean_label(label), grounding.phrase_dim)
                phrase = phrase.to(device, dtype)
        advance(1)
        pictures = tensors.vae_latents(request.vae, tensors.vae_picture(views.vae))
        latents = reference_latents(model, pictures.float()).to(device, dtype)
        reads = model.reference_net is not None and config.reference.cross_attention
        if clip is not None or reads:
            label_out = label_context(clip, label, config).to(device, dtype)
            pooled = encode_pooled(clip, label, config).to(device, dtype)
        states = PictureStates(
            clip=clip_out,
            background=background,
            latents=latents,
            label=label_out,
            pooled=pooled,
            phrase=phrase,
            clip_fingerprint=weights_fingerprint(clip_vision.model),
            number_types=number_types(clip_vision, request.vae, clip),
        )
        advance(1)
        subject = _encode(anystory, views, states, clean_label(label))
    advance(1)
    return subject, views.notes


def _encode(anystory: ManagedAnyStory, views: Views, states: PictureStates, label: str) -> Subject:
    """Encode with the modules on the load device, on as many pictures at a time as it holds."""
    device, config = mm.get_torch_device(), anystory.model.config
    patchers = anystory.having("encoder", "reference_net")
    one = 0
    if "reference_net" in anystory.patchers:
        one = reference_memory(config, compute_dtype(device))
    load(patchers, needed=one * views.clip.shape[0], least=one)
    try:
        return encode_subject(
            anystory.model,
            views,
            states,
            label=label,
            store=mm.unet_offload_device(),
            at_once=fitting(one, device),
        )
    finally:
        release(patchers)


def label_context(clip: Any, label: str, config: AnyStoryConfig) -> Tensor:
    """Text states (1,S,C) of the label, which a ReferenceNet with cross-attention needs."""
    if clip is None:
        raise ModelMismatchError(
            "clip: the ReferenceNet of these AnyStory weights reads the label's text; connect the "
            "clip of the model that will sample"
        )
    return encode_label(clip, label, config)[0][None]
