"""Training samples from folders and WebDataset shards. The schema is in docs/data.md.

Files of one sample share a key: ``KEY.caption.txt`` and

- pair: ``KEY.reference.EXT`` (RGB, or RGBA whose alpha is the mask), optionally
  ``KEY.reference_mask.png``, ``KEY.target.EXT``, and optionally ``KEY.target_mask.png``, 8 bit,
  where the subject is in the target;
- scene: ``KEY.image.EXT`` and ``KEY.masks.png``, 8 bit, 0 = background, i = subject i.

A transparent target or image lies on white, as renderings do; a target's alpha is its mask where no
other is given. EXT is png, jpg, jpeg or webp. Samples are read by position (:mod:`.index`), so
order, shuffling and resume need no state but a number; shards must be uncompressed tar files on a
local disk.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .index import DataError, Entry

PICTURES = ("png", "jpg", "jpeg", "webp")
MOST_BAD = 0.01  # share of corrupt samples at which a run stops


@dataclass(frozen=True)
class Raw:
    """One decoded sample. Pictures (H,W,3) float in [0,1]; masks (N,H,W) float, 1 = subject.

    pair: one reference with its mask (or None); masks has the subject's, or is empty. scene:
    references are cut from the target by its masks."""

    key: str
    caption: str
    target: Tensor
    masks: Tensor
    reference: Tensor | None = None  # (H,W,3 or 4)
    reference_mask: Tensor | None = None  # (H,W)


def decode(entry: Entry) -> Raw:
    """Read one sample. DataError says which file of it is bad."""
    kind = entry.kind
    if kind is None:
        raise DataError(
            f"{entry.key}: has {sorted(entry.files)}, which is neither a pair nor a scene"
        )
    caption = _caption(entry)
    if kind == "pair":
        reference = _picture(entry, "reference")
        mask = None
        if "reference_mask.png" in entry.files:
            mask = _grey(entry, "reference_mask").float() / 255
        target, alpha = _on_white(_picture(entry, "target"))
        masks = torch.zeros(0, *target.shape[:2]) if alpha is None else alpha[None]
        if "target_mask.png" in entry.files:
            masks = _map_of(entry, "target_mask", target)[None].float() / 255
        return Raw(entry.key, caption, target, masks, reference, mask)
    target, _ = _on_white(_picture(entry, "image"))
    labels = _map_of(entry, "masks", target, numbers=True)
    numbers = [int(n) for n in cast(Any, labels.unique()).tolist() if n]
    masks = [(labels == n).float() for n in numbers]
    stacked = torch.stack(masks) if masks else torch.zeros(0, *labels.shape)
    return Raw(entry.key, caption, target, stacked)


def _caption(entry: Entry) -> str:
    try:
        return entry.files["caption.txt"].read().decode().strip()
    except (KeyError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{entry.key}: caption.txt cannot be read ({error})") from error


def _open(entry: Entry, stem: str) -> Image.Image:
    for extension in PICTURES:
        place = entry.files.get(f"{stem}.{extension}")
        if place is not None:
            try:
                image = Image.open(io.BytesIO(place.read()))
                image.load()
                return ImageOps.exif_transpose(image)  # as LoadImage turns it
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise DataError(
                    f"{entry.key}: {stem}.{extension} is not a picture ({error})"
                ) from error
    raise DataError(f"{entry.key}: no {stem} picture among {sorted(entry.files)}")


def _picture(entry: Entry, stem: str) -> Tensor:
    """(H,W,3) float in [0,1], or (H,W,4) where there is transparency."""
    image = _open(entry, stem)
    transparent = image.mode in ("RGBA", "LA") or "transparency" in image.info
    converted = image.convert("RGBA" if transparent else "RGB")
    return torch.from_numpy(np.array(converted)).float() / 255


def _on_white(picture: Tensor) -> tuple[Tensor, Tensor | None]:
    """(H,W,3 or 4) -> ((H,W,3), alpha (H,W) or None). What colour lies under transparency is an
    accident of the program that wrote the file, mostly black."""
    if picture.shape[-1] == 3:
        return picture, None
    alpha = picture[..., 3:]
    return picture[..., :3] * alpha + (1 - alpha), alpha[..., 0]


def _grey(entry: Entry, stem: str, *, numbers: bool = False) -> Tensor:
    """(H,W) uint8: brightness, or of a palette picture the ``numbers`` of its colours."""
    image = _open(entry, stem)
    kept = image.mode == "L" or (numbers and image.mode == "P")
    return torch.from_numpy(np.array(image if kept else image.convert("L")))


def _map_of(entry: Entry, stem: str, picture: Tensor, *, numbers: bool = False) -> Tensor:
    """STEM.png (H,W) uint8; DataError when it is not of the picture's size."""
    labels = _grey(entry, stem, numbers=numbers)
    if labels.shape != picture.shape[:2]:
        raise DataError(
            f"{entry.key}: {stem}.png is {tuple(labels.shape)}, the picture "
            f"{tuple(picture.shape[:2])}"
        )
    return labels


@dataclass
class BadSamples:
    """Counts corrupt samples and names each through ``say`` when it is first met; above
    :data:`MOST_BAD` of those read, stops the run."""

    say: Callable[[str], object] = print
    read: int = 0
    bad: list[str] = field(default_factory=list[str])
    _named: set[str] = field(default_factory=set[str])

    def note(self, error: DataError | None) -> None:
        """Count one sample. DataError when too many were bad, but not for the first two."""
        self.read += 1
        if error is None:
            return
        if str(error) not in self._named:
            self._named.add(str(error))
            self.say(f"a corrupt sample was replaced by the next: {error}")
        self.bad.append(str(error))
        if len(self.bad) > max(2, MOST_BAD * max(self.read, 100)):
            first = "; ".join(self.bad[:3])
            raise DataError(
                f"data: {len(self.bad)} of {self.read} samples are corrupt, more than "
                f"{MOST_BAD:.0%}. First: {first}. Run `python -m anystory_core.training check`"
            )

    def summary(self) -> None:
        """Say at the end how many there were, and which."""
        if self.bad:
            names = sorted({text.split(":")[0] for text in self.bad})
            self.say(f"{len(self.bad)} of {self.read} samples read were corrupt: {names}")
