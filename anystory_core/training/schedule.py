"""SDXL's noise schedule, what a U-Net predicts along it, and pictures drawn along it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..bases.sdxl.prediction import Prediction

BETA_START, BETA_END = 0.00085, 0.012  # SDXL's


def alphas_cumprod(
    steps: int = 1000, start: float = BETA_START, end: float = BETA_END, *, zero_snr: bool = False
) -> Tensor:
    """SDXL's noise schedule ("scaled linear"): alpha_t^2 of Eq. 1, float64 (steps,).

    ``zero_snr``: shifted and scaled so that alpha_0 stays and the last alpha is 0 (Lin et al.,
    arXiv 2305.08891, algorithm 1)."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    squares = (1 - betas).cumprod(0)
    if not zero_snr:
        return squares
    alpha = squares.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


class Schedule:
    """The noise levels that a base was trained on, and what it predicts at them."""

    def __init__(self, prediction: Prediction) -> None:
        self.prediction = prediction
        self.squares = alphas_cumprod(zero_snr=prediction.zero_snr)  # alpha_t^2 (T,) float64

    def __len__(self) -> int:
        return len(self.squares)

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of timesteps (B), each (B,1,1,1), as numbers of ``like``."""
        square = self.squares[t.cpu()].reshape(-1, 1, 1, 1)
        return square.sqrt().to(like), (1 - square).sqrt().to(like)

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2 of timesteps (B), float32 (B)."""
        square = self.squares[t.cpu()]
        return (square / (1 - square)).float().to(t.device)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = alpha_t z_0 + sigma_t eps."""
        alpha, sigma = self.levels(t, clean)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the base should predict of z_t."""
        if self.prediction.kind == "epsilon":
            return noise
        alpha, sigma = self.levels(t, clean)
        return alpha * noise - sigma * clean

    def parts(self, noisy: Tensor, predicted: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """z_0 and eps of z_t, as the prediction has them."""
        alpha, sigma = self.levels(t, noisy)
        if self.prediction.kind == "epsilon":
            return (noisy - sigma * predicted) / alpha, predicted
        return alpha * noisy - sigma * predicted, alpha * predicted + sigma * noisy


@torch.no_grad()
def ddim(
    z: Tensor,
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    steps: int,
    guidance: float,
    schedule: Schedule | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eta 0) with classifier-free guidance: noise z (B,4,h,w)
    -> latents. ``predict(z, t)``, t () int64, gives what conditional and unconditional rows
    predict, each (B,4,h,w); of the noise, unless ``schedule`` says otherwise."""
    schedule = schedule or Schedule(Prediction())
    times = torch.linspace(len(schedule) - 1, 0, steps).round().long()
    for place, t in enumerate(times):
        conditional, unconditional = predict(z, t.to(z.device))
        guided = unconditional + guidance * (conditional - unconditional)
        z, eps = schedule.parts(z, guided, t[None])
        if place + 1 < steps:
            z = schedule.noisy(z, eps, times[place + 1][None])
    return z
