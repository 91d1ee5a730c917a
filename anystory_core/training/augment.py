"""What happens to pictures between a sample and a batch: references are changed, targets are
cropped to the run's shapes."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from .libraries import library
from .settings import AugmentSettings


def augment(
    picture: Tensor, mask: Tensor, settings: AugmentSettings, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Rotate, crop, pad with zeros, flip and recolour a square crop (1,3,s,s), (1,1,s,s).

    The subject is cut out first, so that padding and cropping move it against its frame."""
    enhance, geometry = library("kornia.enhance"), library("kornia.geometry.transform")
    both = torch.cat((picture * mask, mask), dim=1)
    if rng.random() < settings.rotate:
        angle = torch.tensor([rng.uniform(-settings.degrees, settings.degrees)])
        both = geometry.rotate(both, angle, mode="bilinear", padding_mode="zeros")
    if rng.random() < settings.crop:
        side = both.shape[-1]
        kept = max(1, round(side * rng.uniform(settings.least_kept, 1)))
        y, x = rng.randint(0, side - kept), rng.randint(0, side - kept)
        cropped = both[..., y : y + kept, x : x + kept]
        both = cropped if bool((cropped[:, 3:] > 0.5).any()) else both
    if rng.random() < settings.pad:
        edge = round(both.shape[-1] * rng.uniform(0, settings.most_padding))
        left, top = rng.randint(0, edge), rng.randint(0, edge)
        both = torch.nn.functional.pad(both, (left, edge - left, top, edge - top))
    if rng.random() < settings.flip:
        both = both.flip(-1)
    mask = both[:, 3:]
    picture = torch.where(mask > 0.01, both[:, :3] / mask.clamp_min(0.01), 0.0).clamp(0, 1)
    if rng.random() < settings.colour:
        amount = settings.colour_amount
        picture = enhance.adjust_brightness(picture, rng.uniform(-amount, amount))
        picture = enhance.adjust_saturation(picture, 1 + rng.uniform(-amount, amount))
        picture = picture.clamp(0, 1)
    return picture, mask


def centre_crop(
    picture: Tensor, masks: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale until the shape (h,w) is covered, and crop the middle: (H,W,3) in [0,1], (N,H,W) ->
    (3,h,w) in [-1,1], (N,h,w), time_ids (6) as a batch has them."""
    height, width = picture.shape[:2]
    scale = max(shape[0] / height, shape[1] / width)
    target = (max(shape[0], round(height * scale)), max(shape[1], round(width * scale)))
    x = picture.movedim(-1, 0)[None]
    if target != (height, width):
        x = torch.nn.functional.interpolate(
            x, size=target, mode="bicubic", align_corners=False, antialias=True
        ).clamp(0, 1)
        if len(masks):
            masks = torch.nn.functional.interpolate(masks[None], size=target, mode="area")[0]
    top, left = (target[0] - shape[0]) // 2, (target[1] - shape[1]) // 2
    x = x[0, :, top : top + shape[0], left : left + shape[1]]
    masks = masks[:, top : top + shape[0], left : left + shape[1]]
    time_ids = torch.tensor([height, width, top, left, *shape], dtype=torch.float32)
    return 2 * x - 1, masks if len(masks) else masks.new_zeros(0, *shape), time_ids
