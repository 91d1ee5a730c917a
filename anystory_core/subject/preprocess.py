"""Pictures and masks of a subject -> the exact inputs of CLIP and of the ReferenceNet's VAE.

Nodes and training call the same function: crop to the mask's box (x 1.04, padded to a square),
resize, normalise, multiply by the mask. Outside the subject both inputs are 0 *after*
normalisation; public weights may want CLIP's otherwise (:class:`~..config.ClipBranchConfig`).
Pictures are BHWC float in [0,1]; masks are (V,H,W) in [0,1] with 1 = subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases.sdxl.config import AnyStoryConfig
from .masks import MaskReading, find_subjects, notes_on

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BOX_SCALE = 1.04


@dataclass(frozen=True)
class Views:
    """V pictures of one subject, ready for the encoders.

    clip (V,3,S,S): normalised for CLIP, times the mask. vae (V,3,R,R): in [-1,1], times the mask.
    mask (V,1,R,R) in [0,1]. cutout (V,R,R,3) uint8: the same picture for people, grey outside.
    notes: what was assumed, in words for the user.
    """

    clip: Tensor
    vae: Tensor
    mask: Tensor
    cutout: Tensor
    notes: tuple[str, ...] = ()


def zero_clip(config: AnyStoryConfig) -> Tensor:
    """CLIP input (1,3,S,S) of the background: the zero image of the paper."""
    size = config.clip.image_size
    return torch.zeros(1, 3, size, size)


Square = tuple[Tensor, Tensor]  # picture (1,3,s,s) and mask (1,1,s,s), both in [0,1]


def prepare_views(
    image: Tensor,
    mask: Tensor | None,
    config: AnyStoryConfig,
    *,
    invert_mask: bool = False,
    mask_shows: str = "subject",
) -> Views:
    """Cut the subject out of each picture (:func:`cut_squares`) and make the networks' inputs."""
    crops, notes = cut_squares(image, mask, invert_mask=invert_mask, mask_shows=mask_shows)
    return views_of(crops, config, notes)


def cut_squares(
    image: Tensor,
    mask: Tensor | None,
    *,
    invert_mask: bool = False,
    mask_shows: str = "subject",
) -> tuple[list[Square], tuple[str, ...]]:
    """Cut the subject out of each picture; also what was assumed, in words for the user.

    image (V,H,W,C), C = 1, 3 or 4; mask (V or 1,h,w) or None, read as ``mask_shows`` ("auto",
    "subject" or "background") after ``invert_mask``: see :func:`~.masks.find_subjects`.
    SubjectError: no subject in a mask, non-finite values, wrong number of channels or masks,
    another shape.
    """
    rgb, found = find_subjects(image, mask, MaskReading(mask_shows, invert_mask))
    crops = [_crop_square(rgb[v], one.mask) for v, one in enumerate(found)]
    return crops, notes_on(found)


def views_of(crops: Sequence[Square], config: AnyStoryConfig, notes: tuple[str, ...] = ()) -> Views:
    """Resize and normalise square crops. The second half of :func:`prepare_views`; training
    augments between the two."""
    reference = config.reference.size
    vae_rgb = torch.cat([_resize(c, reference) for c, _ in crops])
    vae_mask = torch.cat([_resize(m, reference) for _, m in crops])
    clip = torch.cat([_clip_view(c, m, config) for c, m in crops])
    vae = (2 * vae_rgb - 1) * vae_mask
    cutout = ((vae + 1) / 2 * 255).round().to(torch.uint8).movedim(1, -1).contiguous()
    return Views(clip, vae, vae_mask, cutout, notes)


def _clip_view(picture: Tensor, mask: Tensor, config: AnyStoryConfig) -> Tensor:
    """One square crop as CLIP sees it, the way the weights were trained: (1,3,S,S)."""
    branch, size = config.clip_branch, config.clip.image_size
    inside = mask[0, 0] > 0.5
    if branch.fit == "stretch" and bool(inside.any()):
        top, bottom, left, right = mask_box(inside)
        picture, mask = (x[..., top:bottom, left:right] for x in (picture, mask))
    picture, mask = _resize(picture, size), _resize(mask, size)
    mean = torch.tensor(CLIP_MEAN)[:, None, None]
    std = torch.tensor(CLIP_STD)[:, None, None]
    if branch.outside == "zero":
        return (picture - mean) / std * mask
    colour = 1.0 if branch.outside == "white" else 0.0
    return (picture * mask + colour * (1 - mask) - mean) / std


def cut_out(picture: Tensor, mask: Tensor | None) -> Square:
    """One picture (H,W,3 or 4) and mask (H,W) or None -> its square crop, as in
    :func:`prepare_views`."""
    rgb, (found,) = find_subjects(picture[None], mask, MaskReading())
    return _crop_square(rgb[0], found.mask)


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask channel of the ReferenceNet: (V,1,R,R) averaged down to the latent's grid."""
    return torch.nn.functional.interpolate(mask, size=size, mode="area")


def mask_box(inside: Tensor) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a mask (H,W) bool that is not empty, in pixels; ends are
    exclusive."""
    ys = torch.nonzero(inside.any(dim=1))[:, 0]
    xs = torch.nonzero(inside.any(dim=0))[:, 0]
    return int(ys[0]), int(ys[-1]) + 1, int(xs[0]), int(xs[-1]) + 1


def _crop_square(rgb: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One picture (H,W,3) and its mask (H,W), above 0.5 somewhere -> picture (1,3,s,s) and mask
    (1,1,s,s) around the mask's box."""
    top, bottom, left, right = mask_box(mask > 0.5)
    side = max(1, round(max(bottom - top, right - left) * BOX_SCALE))
    y, x = (top + bottom - side) // 2, (left + right - side) // 2
    # The square may reach over the edge: there the picture is padded with nothing (mask 0).
    y0, y1 = max(y, 0), min(y + side, rgb.shape[0])
    x0, x1 = max(x, 0), min(x + side, rgb.shape[1])
    pad = (x0 - x, x + side - x1, y0 - y, y + side - y1)
    picture = rgb[y0:y1, x0:x1].movedim(-1, 0)[None]
    cut = mask[None, None, y0:y1, x0:x1]
    return torch.nn.functional.pad(picture, pad), torch.nn.functional.pad(cut, pad)


def _resize(x: Tensor, size: int) -> Tensor:
    """(1,C,h,w) -> (1,C,size,size), antialiased bicubic, clamped to [0,1]."""
    if x.shape[-2:] == (size, size):
        return x
    out = torch.nn.functional.interpolate(
        x, size=(size, size), mode="bicubic", align_corners=False, antialias=True
    )
    return out.clamp(0, 1)
