"""Pictures and masks of a subject -> the exact inputs of CLIP and of the ReferenceNet's VAE.

Nodes and training call the same function: crop to the mask's box (x 1.04, padded to a square),
resize, normalise, multiply by the mask. Outside the subject both inputs are 0 *after*
normalisation. Pictures are BHWC float in [0,1]; masks are (V,H,W) in [0,1] with 1 = subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bases.sdxl.config import AnyStoryConfig
from ..errors import SubjectError
from .background import border_share, guess_mask

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


def prepare_views(
    image: Tensor, mask: Tensor | None, config: AnyStoryConfig, *, invert_mask: bool = False
) -> Views:
    """Cut the subject out of each picture.

    image (V,H,W,C), C = 1, 3 or 4 (alpha is the mask when none is given); mask (V or 1,h,w) of any
    size in the picture's shape, or None. ``invert_mask`` is for the host's LoadImage, whose mask is
    1 - alpha; an all-zero 64 x 64 mask is what it gives for a picture without alpha, and counts as
    none.
    SubjectError: empty mask, non-finite values, wrong number of channels or masks, another shape.
    """
    rgb, alpha = _split_channels(image)
    notes: list[str] = []
    if mask is not None and mask.shape[-2:] == (64, 64) and not bool(mask.any()):
        mask = None
    if mask is not None:
        subject = _check_mask(mask, rgb)
        if invert_mask:
            subject = 1 - subject
        if border_share(subject) > 0.9:
            notes.append(
                "The mask covers most of the picture's border: if the background was encoded "
                "instead of the subject, switch invert_mask."
            )
    elif alpha is not None:
        subject = alpha
    else:
        subject, note = guess_mask(rgb)
        notes.append(note)
    crops = [_crop_square(rgb[v], subject[v], v) for v in range(rgb.shape[0])]
    return views_of(crops, config, tuple(notes))


def views_of(
    crops: Sequence[tuple[Tensor, Tensor]], config: AnyStoryConfig, notes: tuple[str, ...] = ()
) -> Views:
    """Resize and normalise square crops: pairs of picture (1,3,s,s) and mask (1,1,s,s), both in
    [0,1]. The second half of :func:`prepare_views`; training augments between the two."""
    reference = config.reference.size
    vae_rgb = torch.cat([_resize(c, reference) for c, _ in crops])
    vae_mask = torch.cat([_resize(m, reference) for _, m in crops])
    clip_rgb = torch.cat([_resize(c, config.clip.image_size) for c, _ in crops])
    clip_mask = torch.cat([_resize(m, config.clip.image_size) for _, m in crops])
    mean = torch.tensor(CLIP_MEAN)[:, None, None]
    std = torch.tensor(CLIP_STD)[:, None, None]
    vae = (2 * vae_rgb - 1) * vae_mask
    cutout = ((vae + 1) / 2 * 255).round().to(torch.uint8).movedim(1, -1).contiguous()
    return Views((clip_rgb - mean) / std * clip_mask, vae, vae_mask, cutout, notes)


def cut_out(picture: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """One picture (H,W,3 or 4) and mask (H,W) or None -> its square crop, as in
    :func:`prepare_views`: picture (1,3,s,s) and mask (1,1,s,s)."""
    rgb, alpha = _split_channels(picture[None])
    given = alpha if mask is None else _check_mask(mask, rgb)
    subject = guess_mask(rgb)[0] if given is None else given
    return _crop_square(rgb[0], subject[0], 0)


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask channel of the ReferenceNet: (V,1,R,R) averaged down to the latent's grid."""
    return torch.nn.functional.interpolate(mask, size=size, mode="area")


def _split_channels(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """(V,H,W,C) -> RGB (V,H,W,3) float32 in [0,1] and alpha (V,H,W), None where all is opaque."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise SubjectError(
            f"image: got shape {tuple(image.shape)}, expected (pictures, height, width, channels) "
            "with 1, 3 or 4 channels"
        )
    image = image.detach().to(device="cpu", dtype=torch.float32)
    if not bool(torch.isfinite(image).all()):
        raise SubjectError(
            "image: it has NaN or infinite pixels, expected numbers from 0 to 1; look at the node "
            "that made the picture"
        )
    image = image.clamp(0, 1)
    alpha = image[..., 3] if image.shape[-1] == 4 else None
    if alpha is not None and not bool((alpha < 1).any()):
        alpha = None
    return image[..., :3].expand(*image.shape[:3], 3), alpha


def _check_mask(mask: Tensor, rgb: Tensor) -> Tensor:
    """Mask as (V,H,W) float32 in [0,1] at the pictures' size."""
    mask = mask.detach().to(device="cpu", dtype=torch.float32)
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 3 or mask.shape[0] not in (1, rgb.shape[0]) or 0 in mask.shape:
        raise SubjectError(
            f"mask: got shape {tuple(mask.shape)}, expected one mask or one for each of the "
            f"{rgb.shape[0]} pictures"
        )
    if not bool(torch.isfinite(mask).all()):
        raise SubjectError("mask: it has NaN or infinite values, expected numbers from 0 to 1")
    mask = mask.clamp(0, 1)
    if mask.shape[-2:] != rgb.shape[1:3]:
        ratio = (mask.shape[-1] / mask.shape[-2]) / (rgb.shape[2] / rgb.shape[1])
        if not 0.95 < ratio < 1.05:
            raise SubjectError(
                f"mask: got {mask.shape[-1]}x{mask.shape[-2]} for a picture of "
                f"{rgb.shape[2]}x{rgb.shape[1]}, expected the same shape; crop or scale it first"
            )
        mask = torch.nn.functional.interpolate(
            mask[:, None], size=rgb.shape[1:3], mode="bilinear", align_corners=False
        )[:, 0]
    return mask.expand(rgb.shape[0], -1, -1)


def mask_box(inside: Tensor) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a mask (H,W) bool that is not empty, in pixels; ends are
    exclusive."""
    ys = torch.nonzero(inside.any(dim=1))[:, 0]
    xs = torch.nonzero(inside.any(dim=0))[:, 0]
    return int(ys[0]), int(ys[-1]) + 1, int(xs[0]), int(xs[-1]) + 1


def _crop_square(rgb: Tensor, mask: Tensor, view: int) -> tuple[Tensor, Tensor]:
    """One view -> picture (1,3,s,s) and mask (1,1,s,s) around the mask's box."""
    inside = mask > 0.5
    if not bool(inside.any()):
        raise SubjectError(
            f"mask: the mask of picture {view + 1} is empty, so there is no subject; paint the "
            "subject, or switch invert_mask if it is painted inverted"
        )
    top, bottom, left, right = mask_box(inside)
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
    """(1,C,s,s) -> (1,C,size,size), antialiased bicubic, clamped to [0,1]."""
    if x.shape[-1] == size:
        return x
    out = torch.nn.functional.interpolate(
        x, size=(size, size), mode="bicubic", align_corners=False, antialias=True
    )
    return out.clamp(0, 1)
