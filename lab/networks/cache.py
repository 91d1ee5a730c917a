"""Latents, CLIP states and text states of the rendered scenes, encoded once and mapped from disk.

Of each shard, in float16: latents (S,4,h,w); of up to N subjects, regions (S,N,h,w) in [0,1],
CLIP states (S,N,257,W) and reference latents (S,N,4,r,r); states (S,2,77,D) and pooled (S,2,D) of
the text. Their second axis is the caption with names and the one that says "an object". A shard
of 500 scenes is 190 MB, nearly all of it CLIP states.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from anystory_core.training.hosts.frozen import penultimate

from ..phase import CPU, autocast
from ..world.scenes import read_shard, shard_numbers
from ..world.views import SIZE, normalise
from . import text
from .clip import Clip
from .vae import to_signed

Half = NDArray[np.float16]
_KINDS = ("latents", "references", "seen", "regions", "states", "pooled")


@dataclass(frozen=True)
class Cached:
    """One shard: float16 tensors, mapped from disk or on a device; regions always on the CPU."""

    latents: Tensor
    references: Tensor
    seen: Tensor
    regions: Tensor
    states: Tensor
    pooled: Tensor

    @cached_property
    def counts(self) -> list[int]:
        """How many subjects each scene has."""
        return [int(count) for count in self.regions.flatten(2).any(dim=2).sum(dim=1)]

    def to(self, device: torch.device) -> Cached:
        """The shard with all but its regions there."""
        moved = {name: tensor.to(device) for name, tensor in vars(self).items()}
        return Cached(**{**moved, "regions": self.regions})


def _file(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number:05d}.{kind}.npy"


def _complete(folder: Path, number: int) -> bool:
    """Whether a shard has all kinds; one that was encoded by older code may lack some."""
    return all(_file(folder, number, kind).exists() for kind in _KINDS)


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Iterable[Tensor]) -> Tensor:
    """Pictures (1,3,H,W) in [-1,1] -> latents (S,4,H/8,W/8). One at a time: the 17 MB of a layer
    stay in the processor's cache; 25 at once took 2.2 times as long."""
    on = next(vae.parameters()).device
    with autocast(on):
        encoded = [
            vae.encode(p.to(on, memory_format=torch.channels_last)).latents.cpu() for p in pixels
        ]
    return torch.cat(encoded).contiguous()


def encode_pictures(vae: Any, pictures: NDArray[np.uint8]) -> Half:
    """uint8 (S,H,W,3) -> latents (S,4,H/8,W/8)."""
    pixels = (to_signed(torch.from_numpy(picture[None].copy())) for picture in pictures)
    return encode_pixels(vae, pixels).half().numpy()


@torch.no_grad()
def encode_texts(
    text_model: Any, row_table: Tensor, texts: list[str], batch: int = 100
) -> tuple[Half, Half]:
    """-> states (S,77,D), pooled (S,D)."""
    on = next(text_model.parameters()).device
    states: list[Tensor] = []
    pooled: list[Tensor] = []
    for start in range(0, len(texts), batch):
        rows = row_table[text.tokenize(texts[start : start + batch])]
        with autocast(on):
            s, p = text.encode(text_model, rows.to(on))
        states.append(s.half().cpu())
        pooled.append(p.half().cpu())
    return torch.cat(states).numpy(), torch.cat(pooled).numpy()


@torch.no_grad()
def encode_cutouts(vision: Any, cutouts: NDArray[np.uint8], batch: int = 10) -> Half:
    """Cut-outs uint8 (M,R,R,3) -> penultimate CLIP states (M,257,W)."""
    on = next(vision.parameters()).device
    seen: list[Tensor] = []
    for start in range(0, len(cutouts), batch):
        pixels = normalise(torch.from_numpy(cutouts[start : start + batch].copy()))
        pixels = functional.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear")
        with autocast(on):
            seen.append(penultimate(vision, pixels.to(on)).half().cpu())
    return torch.cat(seen).numpy()


def _spread(values: Half, there: NDArray[np.bool_]) -> Half:
    """(M,...) of the M that are ``there`` (S,N) -> (S,N,...), zeros for the others."""
    spread = np.zeros((*there.shape, *values.shape[1:]), np.float16)
    spread[there] = values
    return spread


def write_shard(
    scenes: Path, folder: Path, number: int, vae: Any, clip: Clip, row_table: Tensor
) -> None:
    """Encode one shard of scenes; nothing is done when it lies there."""
    if _complete(folder, number):
        return
    folder.mkdir(parents=True, exist_ok=True)
    shard = read_shard(scenes, number)
    named = encode_texts(clip.text, row_table, shard.captions)
    plain = encode_texts(clip.text, row_table, shard.plain_captions)
    there = shard.cutouts.max(axis=(2, 3, 4)) > 0  # (S,N)
    arrays: dict[str, Half] = {
        "latents": encode_pictures(vae, shard.pictures),
        "references": _spread(encode_pictures(vae, shard.cutouts[there]), there),
        "seen": _spread(encode_cutouts(clip.vision, shard.cutouts[there]), there),
        "regions": (shard.regions / np.float32(255)).astype(np.float16),
        "states": np.stack((named[0], plain[0]), axis=1),
        "pooled": np.stack((named[1], plain[1]), axis=1),
    }
    for kind in _KINDS:
        path = _file(folder, number, kind)
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.save(file, arrays[kind])
        os.replace(path.with_suffix(".tmp"), path)


def read_shards(folder: Path, device: torch.device = CPU) -> dict[int, Cached]:
    """All complete shards by their numbers, in order."""
    return {number: read_shard_of(folder, number, device) for number in numbers_of(folder)}


def numbers_of(folder: Path) -> list[int]:
    """Shards that are encoded, in order."""
    there = (int(p.name[:5]) for p in folder.glob(f"*.{_KINDS[-1]}.npy"))
    return sorted(number for number in there if _complete(folder, number))


def read_shard_of(folder: Path, number: int, device: torch.device = CPU) -> Cached:
    """One of them."""
    arrays = (cast(Half, np.load(_file(folder, number, k), mmap_mode="c")) for k in _KINDS)
    return Cached(*(torch.from_numpy(array) for array in arrays)).to(device)


def missing(scenes: Path, folder: Path) -> list[int]:
    """Rendered shards that are not encoded yet."""
    return [n for n in shard_numbers(scenes) if not _complete(folder, n)]
