"""Prepared pictures -> :class:`Subject`: the "encode" half of the paper (Eq. 2, 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ModelMismatchError, SubjectError
from ..weights.model import AnyStoryModel
from .preprocess import Views, latent_mask
from .subject import Subject


def check_clip_states(model: AnyStoryModel, states: Tensor) -> None:
    """ModelMismatchError unless ``states`` are (V, S, W) of the model's CLIP vision encoder."""
    expected = (model.config.clip.tokens, model.config.clip.width)
    if states.ndim != 3 or tuple(states.shape[1:]) != expected:
        raise ModelMismatchError(
            f"clip_vision: it gives {tuple(states.shape[1:])} states, the AnyStory weights expect "
            f"{expected}; load the CLIP vision model that they were trained with"
        )


def reference_latents(model: AnyStoryModel, raw: Tensor) -> Tensor:
    """A VAE's own latents (V,4,h,w) brought to the U-Net's scale."""
    reference = model.config.reference
    channels = model.config.unet.in_channels
    side = reference.size // reference.latent_stride
    if tuple(raw.shape[1:]) != (channels, side, side):
        raise ModelMismatchError(
            f"vae: it gives latents of shape {tuple(raw.shape[1:])} for a picture of "
            f"{reference.size}x{reference.size}, expected {(channels, side, side)}; load the VAE "
            "of the model that the AnyStory weights were trained on"
        )
    return (raw - reference.latent_shift) * reference.latent_scale


@torch.no_grad()
def encode_subject(
    model: AnyStoryModel,
    views: Views,
    *,
    clip_states: Tensor | None,
    background_states: Tensor | None,
    latents: Tensor | None,
    label: str,
    context: Tensor | None = None,
    clip_fingerprint: str = "",
    store: torch.device | str = "cpu",
) -> Subject:
    """Encode V pictures of one subject.

    clip_states (V,S,W) and background_states (1,S,W): penultimate CLIP states of ``views.clip`` and
    of :func:`~.preprocess.zero_clip`; None when the model has no QFormer. latents (V,4,h,w): the
    VAE's of ``views.vae`` at U-Net scale; None without a ReferenceNet. context (V,S,C): text
    states of the label, only for a ReferenceNet with cross-attention. ``clip_fingerprint`` names
    the CLIP vision weights. The modules run where the inputs are; the result is stored on
    ``store``.
    """
    tokens = routing = background_tokens = background_routing = None
    if clip_states is not None and background_states is not None:
        check_clip_states(model, clip_states)
        tokens, routing = model.encoder(clip_states)
        background_tokens, background_routing = model.encoder(background_states)
    features: tuple[Tensor, ...] = ()
    if model.reference_net is not None and latents is not None:
        mask = latent_mask(views.mask, (latents.shape[-2], latents.shape[-1])).to(latents)
        stacked = model.reference_net(torch.cat((latents, mask), dim=1), context)
        features = tuple(x.flatten(0, 1) for x in stacked)  # (V*G_l, d_l)
    if tokens is None and not features:
        raise SubjectError(
            "anystory: these weights hold neither a subject encoder nor a ReferenceNet, so nothing "
            "can encode a subject; load a file that holds one"
        )

    def keep(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(store).contiguous()

    return Subject(
        label=label,
        tokens=None if tokens is None else keep(tokens.flatten(0, 1)),
        features=tuple(x.to(store).contiguous() for x in features),
        routing=None if routing is None else keep(routing.float().mean(dim=0)),
        background_tokens=None if background_tokens is None else keep(background_tokens[0]),
        background_routing=None
        if background_routing is None
        else keep(background_routing[0].float()),
        cutout=views.cutout,
        fingerprint=model.fingerprint,
        clip_fingerprint=clip_fingerprint,
    )
