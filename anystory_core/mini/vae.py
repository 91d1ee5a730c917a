"""The mini VAE: TAESD's layout (f8, 4 channels), trained on the world's pictures.

Latents are kept near zero mean and unit deviation by a penalty, so the latent format has scale 1 and
TAESD's soft clamp at +-3 is never felt.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from .emoji import Emoji
from .phase import Phase
from .world import pool_of, render_reference, render_scene

CROP = 96
BATCH = 12
_SPREAD_WEIGHT = 0.02


def build_vae() -> Any:
    """TAESD as diffusers has it; :func:`host_state` gives ComfyUI's names."""
    return cast(Any, AutoencoderTiny)()


def host_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' AutoencoderTiny names -> TAESD's own, as the host recognises them. The decoder's
    list begins with a clamp there, hence the shifted numbers."""
    out = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for name, tensor in state.items():
        side, _, number, *rest = name.split(".")
        index = int(number) + (side == "decoder")
        out[".".join((f"taesd_{side}", str(index), *rest))] = tensor
    return out


def to_signed(pictures: Tensor) -> Tensor:
    """uint8 (B,H,W,3) -> float (B,3,H,W) in [-1,1]."""
    return pictures.movedim(-1, 1).float() / 127.5 - 1


def _crops(pool: list[list[Emoji]], step: int) -> Tensor:
    """(B,3,CROP,CROP): random crops of scenes, and of references on white."""
    rng = random.Random(step)
    out: list[np.ndarray[Any, Any]] = []
    for i in range(BATCH // 2):
        seed = 10_000_000 + step * BATCH + i
        if rng.random() < 0.8:
            picture = render_scene(pool, seed).picture
        else:
            picture = render_reference(rng.choice(rng.choice(pool)), seed)[0]
        for _ in range(2):
            y, x = rng.randint(0, 256 - CROP), rng.randint(0, 256 - CROP)
            out.append(picture[y : y + CROP, x : x + CROP])
    return to_signed(torch.from_numpy(np.stack(out)))


def reconstruction_loss(a: Tensor, b: Tensor) -> Tensor:
    """L1 of pixels and of neighbouring differences, which keeps edges sharp."""
    loss = (a - b).abs().mean()
    for dim in (-1, -2):
        loss = loss + (a.diff(dim=dim) - b.diff(dim=dim)).abs().mean()
    return loss


def train_vae(emoji: list[Emoji], folder: Path, *, steps: int = 4000) -> Any:
    """Train or resume; returns the module in evaluation mode."""
    torch.manual_seed(1)
    pool = pool_of(emoji)
    vae = build_vae().to(memory_format=torch.channels_last)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        pixels = _crops(pool, step).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(pixels).latents
            restored = vae.decode(latents).sample
        latents = latents.float()
        spread = latents.mean(dim=(0, 2, 3)).square() + (latents.std(dim=(0, 2, 3)) - 1).square()
        return reconstruction_loss(restored.float(), pixels) + _SPREAD_WEIGHT * spread.mean()

    phase = Phase(name="vae", folder=folder, steps=steps, learning_rate=2e-3, seed=1, ema=0.998)
    phase.run(vae, loss_of)
    return vae
