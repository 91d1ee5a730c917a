"""Square crops of a subject -> the exact inputs of the vision encoder and of FLUX's VAE.

As the authors' demo makes them: white outside of the subject, resized by Pillow in 8 bits (bicubic
for the vision encoder, Lanczos for the VAE), normalised, then multiplied by the mask, so that both
are 0 outside. Masks are resized to the nearest pixel. A cell of a grid counts as inside where the
mask touches it at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import FluxConfig


@dataclass(frozen=True)
class FluxViews:
    """V pictures of one subject, ready for the networks.

    vision (V,3,S,S): normalised, times the mask; inside (V,s*s) bool: its patches that the mask
    touches. vae (V,3,R,R) in [-1,1], times the mask; keep (V,g*g) bool: the tokens of the reference
    that the mask touches. cutout (V,R,R,3) uint8: the same picture for people, grey outside. notes:
    what was assumed, in words for the user.
    """

    vision: Tensor
    inside: Tensor
    vae: Tensor
    keep: Tensor
    cutout: Tensor
    notes: tuple[str, ...] = ()


def views_of(
    crops: Sequence[tuple[Tensor, Tensor]], config: FluxConfig, notes: tuple[str, ...] = ()
) -> FluxViews:
    """Square crops: pairs of picture (1,3,s,s) and mask (1,1,s,s), both in [0,1]."""
    white = [(picture * mask + (1 - mask), mask) for picture, mask in crops]
    size, vision = config.reference.size, config.vision
    pictures = torch.cat([_resized(p, size, Image.Resampling.LANCZOS) for p, _ in white])
    masks = torch.cat([_nearest(m, size) for _, m in white])
    vae = (2 * pictures - 1) * masks
    seen = [_resized(p, vision.image_size, Image.Resampling.BICUBIC) for p, _ in white]
    seen_masks = torch.cat([_nearest(m, vision.image_size) for _, m in white])
    return FluxViews(
        vision=(torch.cat(seen) - vision.mean) / vision.std * seen_masks,
        inside=_touched(seen_masks, vision.grid),
        vae=vae,
        keep=_touched(masks, config.reference_grid),
        cutout=((vae + 1) / 2 * 255).round().to(torch.uint8).movedim(1, -1).contiguous(),
        notes=notes,
    )


def _resized(picture: Tensor, size: int, method: Image.Resampling) -> Tensor:
    """(1,3,s,s) in [0,1] -> (1,3,size,size) in [0,1], by Pillow in 8 bits."""
    pixels = (picture[0] * 255).round().clamp(0, 255).to(torch.uint8).movedim(0, -1)
    image = Image.fromarray(pixels.contiguous().numpy())
    if image.size != (size, size):
        image = image.resize((size, size), method)
    back = torch.as_tensor(np.array(image))
    return back.movedim(-1, 0)[None].float() / 255


def _nearest(mask: Tensor, size: int) -> Tensor:
    """(1,1,s,s) -> (1,1,size,size), as Pillow does."""
    return torch.nn.functional.interpolate(mask, size=(size, size), mode="nearest-exact")


def _touched(masks: Tensor, grid: int) -> Tensor:
    """(V,1,R,R) -> (V,grid*grid) bool."""
    return (torch.nn.functional.adaptive_avg_pool2d(masks, grid) > 0).flatten(1)
