"""Prepared pictures -> :class:`Subject`: the "encode" half of the paper (Eq. 2, 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ..bases.sdxl.config import AnyStoryConfig
from ..bases.sdxl.reference_net import ReferenceNet
from ..bases.sdxl.sites import build_sites
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
    of ``views.vae`` at U-Net scale. label (1 or V,S,C) and pooled (P,): text states of the
    subject's label, which a ReferenceNet with cross-attention needs. phrase (P,): the label's
    pooled state of CLIP-L, for weights that are grounded. ``clip_fingerprint`` names the CLIP
    vision weights. ``number_types``: what "clip_vision", "vae" and "clip" computed in, where the
    tensors here are of another type.
    """

    clip: Tensor | None = None
    background: Tensor | None = None
    latents: Tensor | None = None
    label: Tensor | None = None
    pooled: Tensor | None = None
    phrase: Tensor | None = None
    clip_fingerprint: str = ""
    number_types: Mapping[str, torch.dtype] = field(default_factory=dict[str, torch.dtype])

    def parts(self) -> Iterator[tuple[str, Tensor | None]]:
        """Each tensor with the network that made it."""
        yield from (("clip_vision", self.clip), ("clip_vision", self.background))
        yield from (("vae", self.latents), ("clip", self.label))
        yield from (("clip", self.pooled), ("clip", self.phrase))


def check_finite(part: str, made: Tensor | None, number_type: torch.dtype | None = None) -> None:
    """SubjectError when ``made`` by a part of the models holds NaN or infinite values. It computed
    in ``number_type``; None: in that of the tensor."""
    if made is None or bool(torch.isfinite(made).all()):
        return
    name = str(number_type or made.dtype).removeprefix("torch.")
    raise SubjectError(
        f"{part}: it gave NaN or infinite values, computing in {name}; let it compute in float32 "
        "or bfloat16, or load another file of it"
    )


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


def feature_shapes(config: AnyStoryConfig) -> dict[int, tuple[int, int]]:
    """Block l = 2 ... L -> (tokens, width) of its reference features of one picture."""
    side = config.reference.size // config.reference.latent_stride
    sites = build_sites(config.unet)[1:]
    return {site.index: (math.ceil(side / site.stride) ** 2, site.channels) for site in sites}


def reference_memory(config: AnyStoryConfig, number_type: torch.dtype) -> int:
    """Bytes that a ReferenceNet holds at most for one picture, beside its weights: the features,
    and 24 maps of the first block's size for what comes and goes. 14 were counted for SDXL; the
    rest is for what attention and convolutions take besides."""
    kept = sum(tokens * width for tokens, width in feature_shapes(config).values())
    side = config.reference.size // config.reference.latent_stride
    return (kept + 24 * side**2 * config.unet.model_channels) * number_type.itemsize


@torch.no_grad()
def encode_subject(
    model: Encoders,
    views: Views,
    states: PictureStates,
    *,
    label: str,
    store: torch.device | str = "cpu",
    at_once: int | None = None,
) -> Subject:
    """Encode V pictures of one subject. The modules run where ``states`` are, the ReferenceNet on
    ``at_once`` pictures at a time (None: on all); the result is stored on ``store``.

    ModelMismatchError: CLIP states of another encoder. SubjectError: the model can encode nothing,
    or a network gave values that are not finite.
    """
    for part, made in states.parts():
        check_finite(part, made, states.number_types.get(part))
    tokens = routing = background_tokens = background_routing = None
    if states.clip is not None and states.background is not None:
        check_clip_states(model, states.clip)
        tokens, routing = model.encoder(states.clip)
        background_tokens, background_routing = model.encoder(states.background)
        if not model.config.clip_branch.background:
            background_tokens = None
    features: tuple[Tensor, ...] = ()
    inside: Tensor | None = None
    if states.latents is not None:
        grid = (states.latents.shape[-2], states.latents.shape[-1])
        inside = latent_mask(views.mask, grid)[:, 0].float()
    if model.reference_net is not None and states.latents is not None:
        context = states.label if model.config.reference.cross_attention else None
        features = _reference_features(
            model.reference_net, views.mask, states.latents, context, store, at_once
        )
    if tokens is None and not features:
        raise SubjectError(
            "anystory: these weights hold neither a subject encoder nor a ReferenceNet, so nothing "
            "can encode a subject; load a file that holds one"
        )

    def keep(part: str, x: Tensor | None) -> Tensor | None:
        check_finite(f"anystory: {part}", x)
        return None if x is None else x.to(store).contiguous()

    grounded = model.config.clip_branch.grounding is not None
    return Subject(
        label=label,
        tokens=keep("subject encoder", None if tokens is None else tokens.flatten(0, 1)),
        features=features,
        routing=keep("routing encoder", None if routing is None else routing.float().mean(dim=0)),
        background_tokens=keep(
            "subject encoder", None if background_tokens is None else background_tokens[0]
        ),
        background_routing=keep(
            "routing encoder",
            None if background_routing is None else background_routing[0].float(),
        ),
        cutout=views.cutout,
        fingerprint=model.fingerprint,
        clip_fingerprint=states.clip_fingerprint,
        states=keep("clip_vision", states.clip) if grounded else None,
        phrase=keep("clip", states.phrase),
        inside=keep("mask", inside),
        latents=keep("vae", states.latents),
        text=keep("clip", None if states.label is None else states.label[0]),
        pooled=keep("clip", states.pooled),
    )


def _reference_features(
    net: ReferenceNet,
    masks: Tensor,
    latents: Tensor,
    context: Tensor | None,
    store: torch.device | str,
    at_once: int | None,
) -> tuple[Tensor, ...]:
    """L-1 features (V*G_l, d_l) on ``store`` of V latents and masks (V,1,R,R); ``context`` (1 or
    V,S,C) is the label's text, where the net reads it."""
    count = latents.shape[0]
    mask = latent_mask(masks, (latents.shape[-2], latents.shape[-1])).to(latents)
    inputs = torch.cat((latents, mask), dim=1)
    if context is not None:
        context = context.expand(count, -1, -1)
    step = at_once or count
    made: list[list[Tensor]] = []
    for first in range(0, count, step):
        part = slice(first, first + step)
        features = net(inputs[part], None if context is None else context[part])
        for x in features:
            check_finite("anystory: ReferenceNet", x)
        made.append([x.to(store).flatten(0, 1) for x in features])
    return tuple(torch.cat(parts).contiguous() for parts in zip(*made, strict=True))
