"""A batch on its way into the U-Net: noise and timesteps, each sample's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cache import Encoded
from .dataset import sample_seed
from .hosts.unet import UNetInputs
from .schedule import Schedule
from .settings import Timesteps

_NOISE = 1  # what a generator is for, beside the timestep


@dataclass(frozen=True)
class Noised:
    """All that Eq. 1 needs: what the U-Net reads, what it should predict (B,4,h,w), the
    signal-to-noise ratio (B) of its timestep, and ``seeds`` (B) for Gumbel noise."""

    inputs: UNetInputs
    target: Tensor
    snr: Tensor
    seeds: tuple[int, ...]


def draw_timesteps(
    numbers: Sequence[int], seed: int, steps: int, kind: Timesteps = "uniform"
) -> Tensor:
    """A timestep (B) in [0, steps) from each sample's own number. "cubic": t = (1 - u^3) T with u
    uniform, as T2I-Adapter draws it."""
    drawn: list[Tensor] = []
    for number in numbers:
        generator = torch.Generator().manual_seed(sample_seed(seed, number))
        if kind == "cubic":
            late = 1 - torch.rand((), generator=generator) ** 3
            drawn.append((late * steps).long().clamp_max(steps - 1))
        else:
            drawn.append(torch.randint(steps, (), generator=generator))
    return torch.stack(drawn)


def draw_noise(
    shape: Sequence[int], numbers: Sequence[int], seed: int, *, offset: float = 0.0
) -> Tensor:
    """Gaussian noise (B,C,h,w) for latents of ``shape`` (C,h,w), from each sample's own number.

    ``offset``: deviation of a number that is added to all of a channel, so that a picture's mean
    brightness is learned, too (Guttenberg 2023)."""
    drawn: list[Tensor] = []
    for number in numbers:
        generator = _noise_generator(seed, number)
        noise = torch.randn(tuple(shape), generator=generator)
        if offset:
            noise += offset * torch.randn(shape[0], 1, 1, generator=generator)
        drawn.append(noise)
    return torch.stack(drawn)


def _noise_generator(seed: int, number: int) -> torch.Generator:
    """Not the timestep's: its numbers would decide the first ones of the noise. A generator on the
    CPU heeds the lower 32 bits of a seed alone, so that is where they must differ."""
    mixed = np.random.SeedSequence((sample_seed(seed, number), _NOISE)).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def gumbel_seeds(seed: int, numbers: Sequence[int]) -> tuple[int, ...]:
    """A seed for each row's Gumbel noise, small enough to be multiplied by a number of blocks."""
    return tuple(sample_seed(seed, number) % 2**48 for number in numbers)


def make_noised(
    schedule: Schedule, encoded: Encoded, noise: Tensor, timesteps: Tensor, seeds: tuple[int, ...]
) -> Noised:
    """A batch with noise (B,4,h,w) of its timesteps (B)."""
    clean = encoded.latents
    noise, t = noise.to(clean), timesteps.to(clean.device)
    noisy = schedule.noisy(clean, noise, t).to(encoded.text.dtype)
    inputs = UNetInputs(noisy, t, encoded.text, encoded.pooled, encoded.time_ids)
    return Noised(inputs, schedule.target(clean, noise, t), schedule.snr(t), seeds)
