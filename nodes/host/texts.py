"""Text states of labels from the host's text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...anystory_core.bases.sdxl.config import AnyStoryConfig
from ...anystory_core.bases.sdxl.sites import UNetSite
from ...anystory_core.errors import ModelMismatchError, RoutingError
from ...anystory_core.routing.words import Texts
from .conds import is_hooked


def encode_label(clip: Any, label: str, config: AnyStoryConfig) -> tuple[Tensor, int]:
    """States (S,C) of a label on its own, and the number of its own tokens: positions 1 ... n.

    An encoder that answers with a key and a value for each token in turn (CLIPNegPip) is read by
    its keys. ModelMismatchError unless the states have the width of the U-Net's text states, one
    for each token."""
    tokens, empty = clip.tokenize(label), clip.tokenize("")
    states = clip.encode_from_tokens(tokens)[0]
    if states.shape[-1] != config.unet.context_dim:
        raise ModelMismatchError(
            f"clip: it gives text states of width {states.shape[-1]}, the AnyStory weights expect "
            f"{config.unet.context_dim} ({config.name}); connect the clip that encodes the prompt"
        )
    name = next(iter(tokens))
    end = empty[name][0][1][0]  # start, end, padding
    ids = [entry[0] for entry in tokens[name][0]]
    own = next((i for i, x in enumerate(ids) if i > 0 and isinstance(x, int) and x == end), None)
    given = sum(len(part) for part in tokens[name])
    if states.shape[0] == 2 * given and torch.equal(states[::2], states[1::2]):
        states = states[::2]
    if states.shape[0] != given:
        raise ModelMismatchError(
            f"clip: it gives {states.shape[0]} text states for the {given} tokens of the label "
            f"{label!r}, expected one each, or each twice in turn; connect the clip as its loader "
            "gives it"
        )
    return states.float().cpu(), (len(ids) if own is None else own) - 1


def encode_pooled(clip: Any, label: str, config: AnyStoryConfig) -> Tensor:
    """A label's pooled state (P,), as the U-Net's label embedding takes it. ModelMismatchError:
    another width, or none."""
    pooled = clip.encode_from_tokens(clip.tokenize(label), return_pooled=True)[1]
    width = None if pooled is None else pooled.shape[-1]
    if width != config.unet.pooled_dim:
        raise ModelMismatchError(
            f"clip: it gives a pooled text state of width {width}, the AnyStory weights expect "
            f"{config.unet.pooled_dim} ({config.name}); connect the clip that encodes the prompt"
        )
    return pooled[0].float().cpu()


def encode_phrase(clip: Any, label: str, width: int) -> Tensor:
    """A label's pooled state (width,) of CLIP's small text encoder, before the projection that some
    files put behind it. ModelMismatchError: the clip has no such encoder, or another width."""
    small = getattr(clip.cond_stage_model, "clip_l", None)
    tokens = clip.tokenize(label)
    if small is None or "l" not in tokens:
        raise ModelMismatchError(
            "clip: it has no CLIP-L, with which these AnyStory weights read a label; connect the "
            "clip of an SDXL checkpoint"
        )
    clip.load_model()
    small.set_clip_options({"projected_pooled": False})
    try:
        pooled = small.encode_token_weights(tokens["l"])[1]
    finally:
        small.reset_clip_options()
    if pooled.shape[-1] != width:
        raise ModelMismatchError(
            f"clip: its CLIP-L gives {pooled.shape[-1]} numbers for a label, these AnyStory "
            f"weights expect {width}; connect the clip of an SDXL checkpoint"
        )
    return pooled[0].float().cpu()


def label_states(clip: Any, labels: Sequence[str], config: AnyStoryConfig) -> tuple[Tensor, ...]:
    """The labels' own tokens (T_i,C), each label encoded alone. RoutingError: one has none."""
    found: list[Tensor] = []
    for number, label in enumerate(labels, 1):
        states, own = encode_label(clip, label, config)
        if own < 1:
            raise RoutingError(
                f"subject {number}: its label {label!r} has no word for the text encoder; give its "
                "Encode Subject node the words that name it in the prompt"
            )
        found.append(states[1 : 1 + own])
    return tuple(found)


def route_texts(labels: Sequence[Tensor], guider: Any, device: Any) -> Texts:
    """What routing by text needs of a sampling run of ``guider``. Keys are made by each block's own
    ``to_k`` when the U-Net is loaded, patched weights (LoRA) included; anew for every call where
    conds bring weights of their own (LoRA hooks)."""
    unet = guider.model_patcher.model.diffusion_model

    def keys(site: UNetSite, states: Tensor) -> Tensor:
        return unet.get_submodule(site.ldm).attn2.to_k(states)

    moved = tuple(states.to(device, torch.float32) for states in labels)
    return Texts(moved, keys, constant=not is_hooked(guider))
