"""The measuring instrument for places: where subjects are in a picture, and which named place it
shows. A small network of its own, trained on the training families only and never used by the
model; it sees nothing but pixels.

Boxes are predicted as in CenterNet: a heat map whose peaks are subjects, and at each cell the box's
four distances.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from anystory_core.subject.preprocess import mask_box

from ..phase import Phase, autocast, first_makes, shares
from ..world.backgrounds import PLACES
from ..world.emoji import Emoji
from ..world.render import UInt8, pool_of, render_scene
from .identity import soften

SIZE = 128  # larger pictures are shrunk before they are looked at
STRIDE = 8
SCENES = 5000  # rendered for training
BATCH = 32
THRESHOLD = 0.35  # heat of a peak that counts as a subject
OVERLAP = 0.5  # of two boxes that overlap more, the weaker is dropped
_FIRST_SEED = 300_000_000
_MOST = 3
_PLACES = list(PLACES)


@dataclass(frozen=True)
class Found:
    """A subject's place in a picture: box (left, top, right, bottom) in [0,1], heat in [0,1]."""

    box: tuple[float, float, float, float]
    heat: float


class Finder(nn.Module):
    """(B,3,128,128) in [-1,1] -> heat logits (B,16,16), box distances (B,4,16,16) as parts of the
    picture, place logits (B, places)."""

    def __init__(self) -> None:
        super().__init__()

        def unit(wide: int, out: int, stride: int, dilation: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(wide, out, 3, stride, dilation, dilation=dilation, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())

        self.trunk = nn.Sequential(
            unit(3, 24, 2), unit(24, 48, 2), unit(48, 96, 2), unit(96, 96, 1)
        )
        self.wide = nn.Sequential(unit(96, 96, 1, 2), unit(96, 96, 1, 3), unit(96, 96, 1))
        self.heat = nn.Conv2d(96, 1, 1)
        self.box = nn.Conv2d(96, 4, 1)
        self.place = nn.Linear(2 * 96, len(_PLACES))
        nn.init.constant_(cast(Tensor, self.heat.bias), -2.0)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        near = self.trunk(pixels)
        x = self.wide(near)
        pooled = torch.cat((near.mean(dim=(2, 3)), x.mean(dim=(2, 3))), dim=1)
        return (
            self.heat(x)[:, 0].float(),
            functional.softplus(self.box(x).float()),
            self.place(pooled).float(),
        )


def box_of(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """The box of a mask (H,W) that is not empty, in [0,1]."""
    top, bottom, left, right = mask_box(torch.from_numpy(mask))
    height, width = mask.shape
    return left / width, top / height, right / width, bottom / height


def _load_scenes(emoji: Sequence[Emoji], folder: Path) -> tuple[UInt8, NDArray[np.float32]]:
    """Pictures (SCENES,128,128,3) and labels (SCENES,13): the place, then three boxes, -1 where
    there is none. Rendered first when missing."""
    pictures_file, labels_file = folder / "finder.npy", folder / "finder_labels.npy"

    def render() -> None:
        pool = pool_of(emoji)
        shape = (SCENES, SIZE, SIZE, 3)
        temporary = pictures_file.with_suffix(".tmp")
        pictures = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        labels = np.full((SCENES, 1 + 4 * _MOST), -1, np.float32)
        for i in range(SCENES):
            scene = render_scene(pool, _FIRST_SEED + i, size=SIZE)
            pictures[i] = scene.picture
            labels[i, 0] = _PLACES.index(scene.place)
            for n, instance in enumerate(scene.instances):
                labels[i, 1 + 4 * n : 5 + 4 * n] = box_of(instance.mask)
        pictures.flush()
        os.replace(temporary, pictures_file)
        np.save(labels_file, labels)

    first_makes(labels_file, render)
    return np.load(pictures_file, mmap_mode="r"), np.load(labels_file)


def targets(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B,M,4), -1 where absent -> heat (B,h,w) in [0,1], distances (B,4,h,w), and which cells
    (B,h,w) bool have a box: those near a subject's middle."""
    side = SIZE // STRIDE
    at = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(at, at, indexing="ij")
    left, top, right, bottom = (boxes[..., k, None, None] for k in range(4))
    there = (right > left).expand(-1, -1, side, side)
    dx = (x - (left + right) / 2) / (right - left).clamp_min(1e-3)
    dy = (y - (top + bottom) / 2) / (bottom - top).clamp_min(1e-3)
    heat = torch.exp(-(dx.square() + dy.square()) / (2 * 0.15**2)) * there  # (B,M,h,w)
    best, which = heat.max(dim=1)
    distances = torch.stack((x - left, y - top, right - x, bottom - y), dim=2)  # (B,M,4,h,w)
    index = which[:, None, None].expand(-1, 1, 4, -1, -1)
    return best, distances.gather(1, index)[:, 0], best > 0.5


def loss_of_batch(network: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Heat (cross-entropy, middles counting three times), boxes (L1 at the middles), place."""
    heat, box, place = cast(Any, network)(pixels)
    wanted, distances, inside = targets(labels[:, 1:].reshape(len(labels), -1, 4))
    heat_loss = functional.binary_cross_entropy_with_logits(
        heat, wanted, pos_weight=torch.tensor(3.0)
    )
    error = (box - distances).abs().mean(dim=1)
    box_loss = (error * inside).sum() / inside.sum().clamp_min(1)
    return 4 * heat_loss + 4 * box_loss + functional.cross_entropy(place, labels[:, 0].long())


def _changed(pixels: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch flipped or not; half of it softer and noisier, as generated pictures are; relit."""
    if bool(torch.rand((), generator=generator) < 0.5):
        pixels = pixels.flip(-1)
        boxes = labels[:, 1:].reshape(len(labels), -1, 4)
        there = (boxes[..., :1] >= 0).float()
        left, top, right, bottom = boxes.unbind(-1)
        turned = torch.stack((1 - right, top, 1 - left, bottom), -1)
        boxes = turned * there - (1 - there)
        labels = torch.cat((labels[:, :1], boxes.flatten(1)), dim=1)
    return changed(pixels, generator, (40, 120)), labels


def changed(pixels: Tensor, generator: torch.Generator, sides: tuple[int, int]) -> Tensor:
    """A batch (B,3,s,s) in [-1,1] relit; half of it softer (:func:`~.identity.soften`) and noisier,
    as generated pictures are."""
    count, size = len(pixels) // 2, pixels.shape[-1]
    soft = soften(pixels, generator, sides)
    rough = torch.randn(count, 3, size // 4, size // 4, generator=generator)
    noise = functional.interpolate(rough, size=(size, size), mode="bilinear")
    noisy = torch.cat((soft[:count] + 0.08 * noise, soft[count:]))
    gain = 1 + 0.3 * (torch.rand(len(pixels), 1, 1, 1, generator=generator) - 0.5)
    return (noisy * gain).clamp(-1, 1)


def phase(folder: Path) -> Phase:
    """How the network is trained, and where its state lies."""
    return Phase(
        name="finder", folder=folder, steps=2500, learning_rate=2e-3, seed=8, ema=0.998,
    )  # fmt: skip


def train_finder(emoji: Sequence[Emoji], folder: Path) -> None:
    """Train or resume; renders its own scenes."""
    torch.manual_seed(8)
    network = Finder()
    pictures, labels = _load_scenes(emoji, folder)
    table = torch.from_numpy(labels)
    part, parts = shares()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(9_000_000 + step * parts + part)
        chosen = [rng.randrange(SCENES) for _ in range(BATCH // parts)]
        pixels = torch.from_numpy(pictures[chosen]).movedim(-1, 1).float() / 127.5 - 1
        pixels, wanted = _changed(pixels, table[chosen], generator)
        with autocast():
            return loss_of_batch(network, pixels, wanted)

    phase(folder).run(network, loss_of)


def load_finder(folder: Path) -> Finder:
    """The network as the phase left it."""
    network = Finder()
    phase(folder).load(network)
    return network.requires_grad_(False)


@torch.no_grad()
def find(network: Finder, pictures: Tensor) -> list[tuple[list[Found], str]]:
    """Pictures (B,3,H,W) in [-1,1] -> for each its subjects, warmest first, and its place."""
    small = functional.interpolate(pictures, size=(SIZE, SIZE), mode="area")
    heat, box, place = cast("tuple[Tensor, Tensor, Tensor]", cast(Any, network)(small))
    heat = heat.sigmoid()
    peak = heat == functional.max_pool2d(heat[:, None], 3, 1, 1)[:, 0]
    names = [_PLACES[int(i)] for i in place.argmax(dim=1)]
    return [
        (_boxes(heat[row], box[row], peak[row] & (heat[row] >= THRESHOLD)), names[row])
        for row in range(len(pictures))
    ]


def _boxes(heat: Tensor, box: Tensor, chosen: Tensor) -> list[Found]:
    side = heat.shape[0]
    found: list[Found] = []
    for y, x in cast("list[list[int]]", torch.nonzero(chosen).tolist()):
        middle_x, middle_y = (x + 0.5) / side, (y + 0.5) / side
        left, top, right, bottom = cast("list[float]", box[:, y, x].tolist())
        edges = (middle_x - left, middle_y - top, middle_x + right, middle_y + bottom)
        a, b, c, d = (min(max(e, 0.0), 1.0) for e in edges)
        if c - a > 0.02 and d - b > 0.02:
            found.append(Found((a, b, c, d), float(heat[y, x])))
    kept: list[Found] = []
    for one in sorted(found, key=lambda f: -f.heat):
        if all(box_overlap(one.box, other.box) <= OVERLAP for other in kept):
            kept.append(one)
    return kept


def box_overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0
