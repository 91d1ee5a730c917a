"""The networks under test: the mini stack from a training folder or from exported files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ...build import AnyStoryModel
from ...checkpoint import load_model
from ...training import diffusers_unet
from ...training.names import ldm_to_diffusers
from .. import cache, vae
from ..base import build_unet, load_unet
from ..clip import load_clip
from ..config import CONFIG, VISION
from ..text import build_text
from ..weights import row_of_token


@dataclass
class Stack:
    """All networks below AnyStory, frozen, on the CPU. ``slot`` is where a U-Net call is put."""

    unet: Any
    slot: diffusers_unet.Slot
    vae: Any
    text: Any
    row_table: Tensor
    vision: Any
    fingerprint: str

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B,77,D) and pooled (B,D)."""
        states, pooled = cache.encode_texts(self.text, self.row_table, list(captions))
        return torch.from_numpy(states).float(), torch.from_numpy(pooled).float()

    @torch.no_grad()
    def clip_states(self, pixels: Tensor) -> Tensor:
        """Penultimate states (B,257,W) of normalised pixels."""
        return self.vision(pixels, output_hidden_states=True).hidden_states[-2]

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1] -> latents (B,4,h,w)."""
        return self.vae.encode(pixels).latents.float()

    @torch.no_grad()
    def decode_pictures(self, latents: Tensor) -> Tensor:
        """Latents -> (B,3,H,W) in [-1,1]."""
        return self.vae.decode(latents).sample.float().clamp(-1, 1)


def make_stack(unet: Any, vae_: Any, text: Any, row_table: Tensor, vision: Any) -> Stack:
    """Freeze the networks and install our attention."""
    from ...sites import build_sites

    digest = hashlib.sha256()
    for module in (unet, vae_, text, vision):
        module.eval().requires_grad_(False)
        for tensor in module.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
    slot = diffusers_unet.install(unet, build_sites(CONFIG.unet))
    return Stack(unet, slot, vae_, text, row_table, vision, digest.hexdigest()[:16])


def stack_of_work(work: Path) -> Stack:
    """From the phases' averaged weights."""
    clip, row_table = load_clip(work)
    return make_stack(load_unet(work), vae.load_vae(work), clip.text, row_table, clip.vision)


def stack_of_files(folder: Path) -> Stack:
    """From the files that :mod:`..export` writes, as hosts load them (half precision, widened)."""

    def read(part: str) -> dict[str, Tensor]:
        state = load_file(folder / f"{part}.safetensors")
        return {n: t.float() if t.is_floating_point() else t for n, t in state.items()}

    unet, host = build_unet(), read("unet")
    names = ldm_to_diffusers(CONFIG)
    unet.load_state_dict({name: host[key] for key, name in names.items()})
    network, host = vae.build_vae(), read("vae")
    fixed = set(vae.host_state({}))
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        (key,) = set(vae.host_state({name: tensor})) - fixed
        state[name] = host[key]
    network.load_state_dict(state)
    packed = read("clip_text")
    ids = [int(i) for i in packed.pop("token_ids")]
    text = build_text(ids)
    text.load_state_dict(packed)
    vision: Any = cast(Any, CLIPVisionModelWithProjection)(CLIPVisionConfig(**VISION))
    vision.load_state_dict(read("clip_vision"))
    return make_stack(unet, network, text, row_of_token(ids), vision)


def load_anystory(file: Path) -> AnyStoryModel:
    """An AnyStory file in float32, frozen."""
    model = load_model(file, dtype=torch.float32)
    for _, module in model.modules():
        module.eval().requires_grad_(False)
    return model
