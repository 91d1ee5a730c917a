"""DDIM along SDXL's schedule: it ends at the picture that the predicted noise points to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anystory_core.training.schedule import alphas_cumprod, ddim

SHAPE = (2, 4, 3, 3)


def pointing_at(clean: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The noise that is left when ``clean`` is taken out of a latent."""
    alphas = alphas_cumprod().float()

    def noise(z: Tensor, t: Tensor) -> Tensor:
        return (z - alphas[t].sqrt() * clean) / (1 - alphas[t]).sqrt()

    return noise


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_a_known_picture_is_found(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, *SHAPE, generator=generator)
    at = pointing_at(clean)
    found = ddim(noise, lambda z, t: (at(z, t), at(z, t)), steps=steps, guidance=5.0)
    # The first step divides by sqrt(alpha) = 0.07, and float32 has 24 bits.
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-4)


def test_guidance_leads_away_from_what_is_unconditional() -> None:
    generator = torch.Generator().manual_seed(1)
    wanted, other, noise = torch.randn(3, *SHAPE, generator=generator)
    towards, away = pointing_at(wanted), pointing_at(other)
    found = ddim(noise, lambda z, t: (towards(z, t), away(z, t)), steps=10, guidance=3.0)
    torch.testing.assert_close(found, other + 3 * (wanted - other), rtol=0, atol=1e-3)
    times: list[int] = []

    def watch(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        times.append(int(t))
        return towards(z, t), away(z, t)

    ddim(noise, watch, steps=5, guidance=1.0)
    assert times == [999, 749, 500, 250, 0]
