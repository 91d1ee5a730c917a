"""An encoded subject for FLUX: from prepared pictures, and as a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..bases.flux.config import FluxConfig
from ..bases.flux.redux import ReduxEmbedder
from ..bases.flux.views import FluxViews, views_of
from ..errors import ModelMismatchError, SubjectError
from .files import read_subject
from .preprocess import cut_squares
from .subject import EncodedSubject


class FluxEncoders(Protocol):
    """What of a model encodes subjects: a :class:`~..bases.flux.model.FluxModel`."""

    @property
    def config(self) -> FluxConfig: ...
    @property
    def subject_redux(self) -> ReduxEmbedder | None: ...
    @property
    def routing_redux(self) -> ReduxEmbedder | None: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class FluxSubject(EncodedSubject):
    """Everything FLUX needs of one subject.

    concept (V*81,C): its tokens in the text stream; None without that embedder. routing (V*9,C):
    its tokens in the router's stream, likewise. latents (V,16,s,s): its pictures at model scale;
    keep (V,G) bool: their tokens inside the mask. Keys and values of the references are not kept:
    they depend on the prompt.
    """

    family: ClassVar[str] = "flux"

    concept: Tensor | None
    routing: Tensor | None
    latents: Tensor
    keep: Tensor

    def tensors(self) -> dict[str, Tensor]:
        optional = {"concept": self.concept, "routing": self.routing}
        there = {name: x for name, x in optional.items() if x is not None}
        return there | {"latents": self.latents, "keep": self.keep.to(torch.float16)}


def prepare_flux_views(
    image: Tensor,
    mask: Tensor | None,
    config: FluxConfig,
    *,
    invert_mask: bool = False,
    mask_shows: str = "subject",
) -> FluxViews:
    """Cut the subject out of each picture (:func:`~.preprocess.cut_squares`) and make the networks'
    inputs."""
    crops, notes = cut_squares(image, mask, invert_mask=invert_mask, mask_shows=mask_shows)
    return views_of(crops, config, notes)


def flux_latents(config: FluxConfig, raw: Tensor) -> Tensor:
    """A VAE's own latents (V,C,s,s) brought to the model's scale."""
    reference = config.reference
    side = reference.size // reference.latent_stride
    expected = (config.transformer.channels, side, side)
    if tuple(raw.shape[1:]) != expected:
        raise ModelMismatchError(
            f"vae: it gives latents of shape {tuple(raw.shape[1:])} for a picture of "
            f"{reference.size}x{reference.size}, expected {expected}; load FLUX's VAE "
            "(ae.safetensors)"
        )
    return (raw - reference.latent_shift) * reference.latent_scale


@torch.no_grad()
def encode_flux_subject(
    model: FluxEncoders,
    views: FluxViews,
    *,
    states: Tensor,
    latents: Tensor,
    label: str,
    clip_fingerprint: str = "",
    store: torch.device | str = "cpu",
) -> FluxSubject:
    """Encode V pictures of one subject. states (V,s*s,W): the vision encoder's last ones of
    ``views.vision``, after its norm; latents (V,C,h,w): the VAE's of ``views.vae`` at model scale.
    The modules run where ``states`` are; the result is stored on ``store``.

    ModelMismatchError: states of another encoder. SubjectError: the model has no embedder.
    """
    vision = model.config.vision
    expected = (vision.grid**2, vision.width)
    if states.ndim != 3 or tuple(states.shape[1:]) != expected:
        raise ModelMismatchError(
            f"clip_vision: it gives {tuple(states.shape[1:])} states, the AnyStory weights expect "
            f"{expected}; load sigclip_vision_patch14_384"
        )
    if model.subject_redux is None and model.routing_redux is None:
        raise SubjectError(
            "anystory: these weights hold no Redux embedder, so nothing can encode a subject; "
            "convert the authors' file again"
        )
    inside = views.inside.to(states.device)

    def tokens(embedder: ReduxEmbedder | None) -> Tensor | None:
        return None if embedder is None else embedder(states, inside).flatten(0, 1).to(store)

    return FluxSubject(
        label=label,
        concept=tokens(model.subject_redux),
        routing=tokens(model.routing_redux),
        latents=latents.to(store).contiguous(),
        keep=views.keep.to(store),
        cutout=views.cutout,
        fingerprint=model.fingerprint,
        clip_fingerprint=clip_fingerprint,
    )


def load_flux_subject(path: str | os.PathLike[str], model: FluxEncoders) -> FluxSubject:
    """Read one subject for FLUX (:func:`~.files.read_subject`)."""
    config = model.config

    def expected(views: int) -> dict[str, tuple[int, ...]]:
        width, side = config.transformer.context_dim, config.reference.size
        side //= config.reference.latent_stride
        shapes: dict[str, tuple[int, ...]] = {
            "latents": (views, config.transformer.channels, side, side),
            "keep": (views, config.reference_grid**2),
        }
        if model.subject_redux is not None:
            shapes["concept"] = (views * config.redux.subject_tokens, width)
        if model.routing_redux is not None:
            shapes["routing"] = (views * config.redux.routing_tokens, width)
        return shapes

    saved = read_subject(
        path, model, expected, family=FluxSubject.family, size=config.reference.size
    )
    tensors = saved.tensors
    return FluxSubject(
        label=saved.label,
        concept=tensors.get("concept"),
        routing=tensors.get("routing"),
        latents=tensors["latents"],
        keep=tensors["keep"] > 0,
        cutout=saved.cutout,
        fingerprint=saved.weights,
        clip_fingerprint=saved.clip,
        options=saved.options,
    )
