"""The host's tensors and ours: layouts and value ranges change here and nowhere else."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ...anystory_core.errors import ModelMismatchError, SubjectError
from .managed import is_out_of_memory

PIXELS_PER_LATENT = 8


def vae_picture(x: Tensor) -> Tensor:
    """(V,3,R,R) in [-1,1] -> the host's IMAGE (V,R,R,3) in [0,1]."""
    return (x.movedim(1, -1) + 1) / 2


def uint8_picture(x: Tensor) -> Tensor:
    """(V,H,W,3) uint8 -> the host's IMAGE (V,H,W,3) float in [0,1]."""
    return x.float() / 255


def vae_latents(vae: Any, picture: Tensor) -> Tensor:
    """The host's VAE on an IMAGE (V,H,W,3) in [0,1]; ModelMismatchError when it cannot. The host's
    own error passes when memory is short: it frees some then."""
    try:
        return vae.encode(picture)
    except (RuntimeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        height, width = picture.shape[1:3]
        raise ModelMismatchError(
            f"vae: it cannot encode a picture of {width}x{height} ({error}); connect the VAE of "
            "the model that samples"
        ) from error


class Latents(Protocol):
    """How a file's references were encoded."""

    @property
    def latent_scale(self) -> float: ...
    @property
    def latent_shift(self) -> float: ...


def check_latent_format(model: Any, references: Latents, remedy: str) -> None:
    """ModelMismatchError unless a ModelPatcher's model has latents at the scale that the references
    were encoded at."""
    latent_format = model.model.latent_format
    got = getattr(latent_format, "scale_factor", 1.0), getattr(latent_format, "shift_factor", 0.0)
    wanted = references.latent_scale, references.latent_shift
    if any(abs(a - b) > 1e-4 for a, b in zip(got, wanted, strict=True)):
        raise ModelMismatchError(
            f"model: its latents have scale and shift {got}, these AnyStory weights expect "
            f"{wanted}; {remedy}"
        )


def routing_mask(mask: Tensor, name: str) -> Tensor:
    """The host's MASK (M,H,W) or (H,W) -> float32 on the CPU in [0,1], 1 = subject: (H,W), or
    (M,H,W) of several."""
    flat = mask.detach().to("cpu", torch.float32)
    if flat.ndim > 2 and flat.shape[0] == 1:
        flat = flat.reshape(-1, flat.shape[-1])
    if flat.ndim not in (2, 3) or 0 in flat.shape:
        raise SubjectError(
            f"{name}: got shape {tuple(mask.shape)}, expected (height, width), or (pictures, "
            "height, width)"
        )
    if not bool(torch.isfinite(flat).all()):
        raise SubjectError(f"{name}: it has NaN or infinite values, expected numbers from 0 to 1")
    return flat.clamp(0, 1)
