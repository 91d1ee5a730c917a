"""Prepared pictures -> :class:`Subject`: the "encode" half of the paper (Eq. 2, 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..bases.sdxl.config import AnyStoryConfig
from ..bases.sdxl.reference_net import ReferenceNet
from ..errors import ModelMismatchError, SubjectError
from .preprocess import Views, latent_mask
from .qformer import QFormer
from .subject import Subject


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


class Encoders(Protocol):
    """What of a model encodes subjects: an :class:`~..weights.model.AnyStoryModel`."""

    @property
    def config(self) -> AnyStoryConfig: ...
    @property
    def encoder(self) -> SubjectEncoder: ...
    @property
    def reference_net(self) -> ReferenceNet | None: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class PictureStates:
    """What the networks beside AnyStory's own make of V pictures of one subject.

    clip (V,S,W) and background (1,S,W): penultimate CLIP states of ``views.clip`` and of
    :func:`~.preprocess.zero_clip`; None when the model has no QFormer. latents (V,4,h,w): the VAE's
    of ``views.vae`` at U-Net scale; None without a ReferenceNet. label (1 or V,S,C): text states of
    the subject's label, only for a ReferenceNet with cross-attention. phrase (P,): the label's
    pooled text state, for weights that are grounded. ``clip_fingerprint`` names the CLIP vision
    weights.
    """

    clip: Tensor | None = None
    background: Tensor | None = None
    latents: Tensor | None = None
    label: Tensor | None = None
    phrase: Tensor | None = None
    clip_fingerprint: str = ""


def check_clip_states(model: Encoders, states: Tensor) -> None:
    """ModelMismatchError unless ``states`` are (V, S, W) of the model's CLIP vision encoder."""
    expected = (model.config.clip.tokens, model.config.clip.width)
    if states.ndim != 3 or tuple(states.shape[1:]) != expected:
        raise ModelMismatchError(
            f"clip_vision: it gives {tuple(states.shape[1:])} states, the AnyStory weights expect "
            f"{expected}; load the CLIP vision model that they were trained with"
        )


def reference_latents(model: Encoders, raw: Tensor) -> Tensor:
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
    model: Encoders,
    views: Views,
    states: PictureStates,
    *,
    label: str,
    store: torch.device | str = "cpu",
) -> Subject:
    """Encode V pictures of one subject. The modules run where ``states`` are; the result is stored
    on ``store``.

    ModelMismatchError: CLIP states of another encoder. SubjectError: the model can encode nothing.
    """
    tokens = routing = background_tokens = background_routing = None
    if states.clip is not None and states.background is not None:
        check_clip_states(model, states.clip)
        tokens, routing = model.encoder(states.clip)
        background_tokens, background_routing = model.encoder(states.background)
        if not model.config.clip_branch.background:
            background_tokens = None
    features: tuple[Tensor, ...] = ()
    latents, context = states.latents, states.label
    if model.reference_net is not None and latents is not None:
        mask = latent_mask(views.mask, (latents.shape[-2], latents.shape[-1])).to(latents)
        if context is not None:
            context = context.expand(latents.shape[0], -1, -1)
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
        clip_fingerprint=states.clip_fingerprint,
        states=keep(states.clip) if model.config.clip_branch.grounding is not None else None,
        phrase=keep(states.phrase),
    )
