"""SDXL's noise schedule, and pictures drawn along it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def alphas_cumprod(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """SDXL's noise schedule ("scaled linear"): alpha_t^2 of Eq. 1, float64 (steps,)."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


@torch.no_grad()
def ddim(
    z: Tensor,
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    steps: int,
    guidance: float,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eta 0) with classifier-free guidance: noise z (B,4,h,w)
    -> latents. ``predict(z, t)``, t () int64, gives the noise that conditional and unconditional
    rows predict, each (B,4,h,w)."""
    alphas = alphas_cumprod().float().to(z.device)
    times = torch.linspace(len(alphas) - 1, 0, steps).round().long().to(z.device)
    for place, t in enumerate(times):
        now = alphas[t]
        later = alphas[times[place + 1]] if place + 1 < steps else now.new_ones(())
        conditional, unconditional = predict(z, t)
        eps = unconditional + guidance * (conditional - unconditional)
        clean = (z - (1 - now).sqrt() * eps) / now.sqrt()
        z = later.sqrt() * clean + (1 - later).sqrt() * eps
    return z
