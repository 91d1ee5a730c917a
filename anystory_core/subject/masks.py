"""Where the subject is in each picture: a mask that was given, alpha, or a guess.

Pictures are (V,H,W,3), masks (V,H,W), both in [0,1]; each picture is judged alone. What was assumed
is said in sentences for the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SubjectError
from .background import cut_background

MASK_SHOWS = ("auto", "subject", "background")
_MOSTLY = 0.9  # of the border inside a subject: then it is probably the background
_NO_ALPHA = (64, 64)  # size of the zeros that the host's LoadImage gives for a picture without
_ONE_COLOUR = 0.99  # of the pixels alike: then there is nothing to see
_ALIKE = 0.02  # colour distance


@dataclass(frozen=True)
class MaskReading:
    """What a given mask means: ``shows`` of :data:`MASK_SHOWS`, after ``invert``. auto: the side
    that has most of the border is the background, whatever ``invert`` is.

    SubjectError for another word.
    """

    shows: str = "subject"
    invert: bool = False

    def __post_init__(self) -> None:
        if self.shows not in MASK_SHOWS:
            raise SubjectError(f"mask_shows: got {self.shows!r}, expected one of {MASK_SHOWS}")

    @property
    def flips(self) -> bool:
        """Whether the mask is 1 outside the subject (without auto)."""
        return self.invert != (self.shows == "background")


@dataclass(frozen=True)
class Found:
    """A subject in one picture: mask (H,W), and sentences on what was assumed."""

    mask: Tensor
    said: tuple[str, ...] = ()


def find_subjects(
    image: Tensor, mask: Tensor | None, reading: MaskReading
) -> tuple[Tensor, list[Found]]:
    """Pictures (V,H,W,3) of an ``image`` (V,H,W,C), C = 1, 3 or 4, and the subject in each.

    ``mask`` is (V or 1,h,w) of any size in the picture's shape. Where it is None, alpha is the
    mask; where that hides nothing, a plain background is cut away, or the whole picture is the
    subject. A mask of zeros counts as none where the host's LoadImage means a picture without
    alpha: at 64 x 64, and at any size when it shows the background.

    SubjectError: no subject in a mask, values that are not finite, wrong number of channels or
    masks, a mask of another shape.
    """
    rgb, alpha = _split_channels(image)
    zeros_are_none = mask is not None and (
        reading.shows == "auto" or reading.flips or tuple(mask.shape[-2:]) == _NO_ALPHA
    )
    given = None if mask is None else _check_mask(mask, rgb)
    found: list[Found] = []
    for v, picture in enumerate(rgb):
        if given is not None and not (zeros_are_none and not bool(given[v].any())):
            found.append(_read_mask(picture, given[v], reading, v + 1))
        elif alpha is not None and bool((alpha[v] < 1).any()):
            found.append(_found(picture, alpha[v], f"image: the alpha of picture {v + 1}"))
        else:
            why = "there is no mask" if given is None else "the mask is empty"
            found.append(_guess(picture, why))
    return rgb, found


def notes_on(found: Sequence[Found]) -> tuple[str, ...]:
    """What was assumed of which picture, each sentence once. A single picture has no number."""
    if len(found) == 1:
        return found[0].said
    numbers: dict[str, list[str]] = {}
    for number, one in enumerate(found, 1):
        for sentence in one.said:
            numbers.setdefault(sentence, []).append(str(number))
    return tuple(
        f"{'Picture' if len(these) == 1 else 'Pictures'} {', '.join(these)}: "
        + sentence[0].lower()
        + sentence[1:]
        for sentence, these in numbers.items()
    )


def _read_mask(picture: Tensor, mask: Tensor, reading: MaskReading, number: int) -> Found:
    subject, said = mask, ""
    if reading.shows != "auto":
        subject = 1 - mask if reading.flips else mask
        if _border_share(subject) > _MOSTLY:
            said = (
                "The mask covers most of the picture's border: if the background was encoded "
                "instead of the subject, set mask_shows to auto, or switch invert_mask."
            )
    elif bool((mask > 0.5).all()):
        said = "The mask shows the subject, for it covers everything."
    elif _border_share(mask) > 0.5:
        subject = 1 - mask
        said = "The mask shows the background, for it covers most of the border."
    else:
        said = "The mask shows the subject, for most of the border is outside it."
    return _found(picture, subject, f"mask: the mask of picture {number}", said)


def _found(picture: Tensor, subject: Tensor, name: str, said: str = "") -> Found:
    """SubjectError with what was seen when a subject's mask is nowhere above 0.5."""
    most = float(subject.max())
    if most == 0:
        raise SubjectError(
            f"{name} is empty, so there is no subject; paint the subject, or switch invert_mask or "
            "mask_shows if it is painted the other way round"
        )
    if most <= 0.5:
        raise SubjectError(
            f"{name} is faint: its subject reaches {most:.2g}, expected more than 0.5 where the "
            "subject is; raise its contrast, or paint it again"
        )
    return Found(subject, _sentences(said, _blank(picture[subject > 0.5])))


def _guess(picture: Tensor, why: str) -> Found:
    subject = cut_background(picture)
    if subject is None:
        subject = torch.ones(picture.shape[:2])
        said = f"The whole picture is taken as the subject: {why}, and no plain background."
    else:
        said = f"The plain background was cut away: {why}."
    return Found(subject, _sentences(said, _blank(picture.flatten(0, 1))))


def _sentences(*said: str) -> tuple[str, ...]:
    return tuple(sentence for sentence in said if sentence)


def _blank(pixels: Tensor) -> str:
    """What to say of pixels (n,3) that nearly all have one colour; nothing of others."""
    colour = pixels.median(dim=0).values
    if float(((pixels - colour).abs().amax(-1) <= _ALIKE).float().mean()) < _ONE_COLOUR:
        return ""
    code = "".join(f"{round(float(x) * 255):02X}" for x in colour)
    return (
        f"There is one colour all over, #{code}: if there should be more, look at the picture; one "
        "of 16 bits must be saved with 8."
    )


def _split_channels(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """(V,H,W,C) -> RGB (V,H,W,3) float32 in [0,1] and alpha (V,H,W), None without a channel."""
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
    if not bool(mask.any()):
        return torch.zeros(rgb.shape[:3])
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


def _border_share(mask: Tensor) -> float:
    """How much of a mask's (H,W) border lies inside it; corners count twice."""
    border = torch.cat((mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    return float((border > 0.5).float().mean())
