"""The host's tensors and ours: layouts and value ranges change here and nowhere else."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ...anystory_core.errors import SubjectError


def vae_picture(x: Tensor) -> Tensor:
    """(V,3,R,R) in [-1,1] -> the host's IMAGE (V,R,R,3) in [0,1]."""
    return (x.movedim(1, -1) + 1) / 2


def uint8_picture(x: Tensor) -> Tensor:
    """(V,H,W,3) uint8 -> the host's IMAGE (V,H,W,3) float in [0,1]."""
    return x.float() / 255


def routing_mask(mask: Tensor, name: str) -> Tensor:
    """The host's MASK (1,H,W) or (H,W) -> (H,W) float32 on the CPU in [0,1], 1 = subject."""
    mask = mask.detach().to("cpu", torch.float32)
    if mask.ndim == 3 and mask.shape[0] > 1:
        raise SubjectError(
            f"{name}: got {mask.shape[0]} masks, expected one; pick one of the batch first"
        )
    flat = mask.reshape(-1, mask.shape[-1]) if mask.ndim == 3 else mask
    if flat.ndim != 2 or 0 in flat.shape:
        raise SubjectError(f"{name}: got shape {tuple(mask.shape)}, expected (height, width)")
    if not bool(torch.isfinite(flat).all()):
        raise SubjectError(f"{name}: it has NaN or infinite values, expected numbers from 0 to 1")
    return flat.clamp(0, 1)


def weights_fingerprint(module: torch.nn.Module) -> str:
    """Names weights by all shapes and the first values of every tensor; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[:64].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint(latent: Tensor) -> str:
    """Names a latent by its values in float32, wherever it lies."""
    data = latent.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()
