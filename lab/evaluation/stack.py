"""The networks under test: the mini stack from a training folder or from exported files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystory_core.bases.base import Site
from anystory_core.bases.sdxl.prediction import Prediction
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.mini.config import CONFIG
from anystory_core.mini.weights import row_of_token
from anystory_core.routing.words import Texts
from anystory_core.training.hosts import unet as diffusers_unet
from anystory_core.training.hosts.folder import folder_prediction
from anystory_core.training.hosts.frozen import penultimate
from anystory_core.training.schedule import Schedule
from anystory_core.weights.checkpoint import load_model
from anystory_core.weights.model import AnyStoryModel

from ..files.shipped import read_modules
from ..networks import cache, vae
from ..networks.base import load_unet
from ..networks.clip import load_clip
from ..networks.text import END, tokenize
from ..phase import autocast


@dataclass
class Stack:
    """All networks below AnyStory, frozen, on the CPU. ``slot`` is where a U-Net call is put."""

    unet: Any
    slot: diffusers_unet.Slot
    vae: Any
    text: Any
    row_table: Tensor
    vision: Any
    schedule: Schedule
    fingerprint: str

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B,77,D) and pooled (B,D)."""
        states, pooled = cache.encode_texts(self.text, self.row_table, list(captions))
        return torch.from_numpy(states).float(), torch.from_numpy(pooled).float()

    @torch.no_grad()
    def texts(self, labels: Sequence[str]) -> Texts:
        """What routing by text needs: each label's own tokens, encoded alone."""
        states, _ = self.encode_text(labels)
        ends = (tokenize(list(labels)) == END).int().argmax(dim=1)
        own = [row[1 : int(end)] for row, end in zip(states, ends, strict=True)]

        blocks = {site.index: site.diffusers for site in build_sites(CONFIG.unet)}

        def keys(site: Site, given: Tensor) -> Tensor:
            return self.unet.get_submodule(blocks[site.index]).attn2.to_k(given)

        return Texts(tuple(own), keys)

    @torch.no_grad()
    def clip_states(self, pixels: Tensor) -> Tensor:
        """Penultimate states (B,257,W) of normalised pixels."""
        return penultimate(self.vision, pixels)

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1] -> latents (B,4,h,w)."""
        return cache.encode_pixels(self.vae, pixels.split(1)).float()

    @torch.no_grad()
    def decode_pictures(self, latents: Tensor) -> Tensor:
        """Latents -> (B,3,H,W) in [-1,1]."""
        with autocast():
            pictures = torch.cat([self.vae.decode(z).sample for z in latents.split(1)])
        return pictures.float().clamp(-1, 1)


def make_stack(
    unet: Any, vae_: Any, text: Any, row_table: Tensor, vision: Any, prediction: Prediction
) -> Stack:
    """Freeze the networks and install our attention."""
    digest = hashlib.sha256(str(prediction).encode())
    for module in (unet, vae_, text, vision):
        module.eval().requires_grad_(False)
        for tensor in module.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
    slot = diffusers_unet.install(unet, build_sites(CONFIG.unet))
    digits = digest.hexdigest()[:16]
    return Stack(unet, slot, vae_, text, row_table, vision, Schedule(prediction), digits)


def stack_of_work(work: Path) -> Stack:
    """From the phases' averaged weights."""
    clip, row_table = load_clip(work)
    unet, autoencoder = load_unet(work), vae.load_vae(work)
    prediction = folder_prediction(work)
    return make_stack(unet, autoencoder, clip.text, row_table, clip.vision, prediction)


def stack_of_files(folder: Path) -> Stack:
    """From the files that :mod:`..files.export` writes, as hosts load them: half precision,
    widened."""
    parts = read_modules(folder)
    rows = row_of_token(parts.ids)
    return make_stack(parts.unet, parts.vae, parts.text, rows, parts.vision, parts.prediction)


def load_anystory(file: Path) -> AnyStoryModel:
    """An AnyStory file in float32, frozen."""
    model = load_model(file, dtype=torch.float32)
    for _, module in model.modules():
        module.eval().requires_grad_(False)
    return model
