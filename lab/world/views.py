"""Cut-out views of every subject for CLIP, rendered once: turned, flipped, relit, of varied
sharpness, cropped as :func:`~anystory_core.subject.preprocess.prepare_views` crops, on CLIP's mean
colour (which is zero after normalisation).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anystory_core.subject.preprocess import BOX_SCALE, CLIP_MEAN, CLIP_STD

from ..phase import first_makes
from .emoji import Emoji
from .render import UInt8, solid_box, transformed

SIZE = 224
VIEWS = 6
_GROUND = tuple(round(255 * c) for c in CLIP_MEAN)


def render_view(emoji: Emoji, rng: random.Random) -> UInt8:
    """(224,224,3) uint8."""
    sprite, _ = transformed(emoji, rng, round(rng.uniform(70, 180)))
    sprite = sprite.crop(solid_box(sprite))
    side = round(max(sprite.size) * BOX_SCALE)
    canvas = Image.new("RGBA", (side, side), (*_GROUND, 255))
    x, y = (side - sprite.width) // 2, (side - sprite.height) // 2
    canvas.alpha_composite(sprite, (x, y))
    return np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def load_views(emoji: Sequence[Emoji], file: Path) -> UInt8:
    """(len(emoji), VIEWS, 224, 224, 3), mapped from disk, rendered first when missing."""

    def view(i: int, number: int) -> UInt8:
        return render_view(emoji[i], random.Random(i * VIEWS + number))

    return load_rendered(file, (len(emoji), VIEWS, SIZE, SIZE, 3), view)


def load_rendered(file: Path, shape: tuple[int, ...], render: Callable[[int, int], UInt8]) -> UInt8:
    """Pictures (A,B,H,W,C), mapped from disk; ``render(a, b)`` draws each when there is no file."""

    def write() -> None:
        temporary = file.with_suffix(".tmp")
        out = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        for a, b in np.ndindex(*shape[:2]):
            out[a, b] = render(a, b)
        out.flush()
        os.replace(temporary, file)

    first_makes(file, write)
    return np.load(file, mmap_mode="r")


def normalise(pictures: Tensor) -> Tensor:
    """uint8 (B,H,W,3) -> CLIP input (B,3,H,W)."""
    mean = torch.tensor(CLIP_MEAN)[:, None, None]
    std = torch.tensor(CLIP_STD)[:, None, None]
    return (pictures.movedim(-1, 1).float() / 255 - mean) / std
