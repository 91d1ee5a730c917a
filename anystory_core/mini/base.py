"""The base: a U-Net of SDXL's topology, trained from scratch on the world's scenes (Eq. 1).

Latents and text states come from the cache; the noise schedule is SDXL's. Losses are weighted by
min(SNR, 5) / SNR, timesteps are spread evenly over a batch, and one caption in ten is dropped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.nn import functional

from ..training.bases import alphas_cumprod
from ..training.names import diffusers_unet_config
from .cache import Cached, encode_texts, read_shards
from .clip import load_clip
from .config import CONFIG, PICTURE_SIZE
from .phase import Phase, autocast, half_is_faster, shares

BATCH = 32
_DROP = 0.1
_PLAIN = 0.3  # share of captions that say only "an object"
_MOST_SNR = 5.0
_LOOK_AGAIN = 500  # steps after which newly cached shards are taken up


def build_unet() -> Any:
    """diffusers' UNet2DConditionModel at the mini sizes, untrained."""
    return cast(Any, UNet2DConditionModel)(**diffusers_unet_config(CONFIG.unet))


def size_ids(batch: int) -> Tensor:
    """SDXL's size conditioning (B,6): original size, crop, target size; constant here."""
    row = (PICTURE_SIZE, PICTURE_SIZE, 0, 0, PICTURE_SIZE, PICTURE_SIZE)
    return torch.tensor([row], dtype=torch.float32).repeat(batch, 1)


def spread_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """(B,) int64 in [0,1000): one from each of B equal slices."""
    offset = torch.rand(batch, generator=generator)
    return ((torch.arange(batch) + offset) / batch * 1000).long()


def pick(
    shards: list[Cached], count: int, empty: tuple[Tensor, Tensor], rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random cached scenes: latents (B,4,16,16), states (B,77,D), pooled (B,D), float32."""
    latents: list[Tensor] = []
    states: list[Tensor] = []
    pooled: list[Tensor] = []
    for _ in range(count):
        shard = shards[rng.integers(len(shards))]
        at, plain = rng.integers(len(shard.latents)), int(rng.random() < _PLAIN)
        latents.append(torch.from_numpy(shard.latents[at].copy()).float())
        if rng.random() < _DROP:
            states.append(empty[0])
            pooled.append(empty[1])
        else:
            states.append(torch.from_numpy(shard.states[at, plain].copy()).float())
            pooled.append(torch.from_numpy(shard.pooled[at, plain].copy()).float())
    return torch.stack(latents), torch.stack(states), torch.stack(pooled)


def phase(folder: Path, steps: int) -> Phase:
    """Its rate and seed."""
    return Phase(name="base", folder=folder, steps=steps, learning_rate=8e-4, seed=3, ema=0.9995)


def load_unet(folder: Path) -> Any:
    """The U-Net with averaged weights, as far as the phase has come."""
    unet = build_unet()
    phase(folder, 1).load(unet)
    return unet.requires_grad_(False)


def train_base(folder: Path, *, steps: int) -> None:
    """Train or resume on the shards of ``folder/cache``; more may be added meanwhile."""
    torch.manual_seed(3)
    clip, row_table = load_clip(folder)
    # Fused attention's backward is slow on a CPU. Channels-last is faster in float32 (0.87 against
    # 1.0 s per step of 32 on one thread) and slower in bfloat16.
    unet = build_unet()
    unet.set_attn_processor(AttnProcessor())
    layout = torch.contiguous_format if half_is_faster() else torch.channels_last
    unet.to(memory_format=layout)
    shards = read_shards(folder / "cache")
    states, pooled = encode_texts(clip.text, row_table, [""])
    empty = torch.from_numpy(states[0]).float(), torch.from_numpy(pooled[0]).float()
    signal = alphas_cumprod().float()
    part, parts = shares()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        if step % _LOOK_AGAIN == 0:
            shards[:] = read_shards(folder / "cache")
        count = BATCH // parts
        rng = np.random.default_rng((3, step, part))
        latents, context, label = pick(shards, count, empty, rng)
        t = spread_timesteps(count, generator)
        noise = torch.randn(latents.shape, generator=generator)
        a = signal[t][:, None, None, None]
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        with autocast():
            predicted = unet(
                noisy.contiguous(memory_format=layout),
                t,
                context,
                added_cond_kwargs={"text_embeds": label, "time_ids": size_ids(count)},
            ).sample
        snr = signal[t] / (1 - signal[t])
        weight = snr.clamp(max=_MOST_SNR) / snr
        errors = functional.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        return (weight * errors).mean()

    phase(folder, steps).run(unet, loss_of)
