"""The measuring instrument for outlines: which pixels of a picture are a subject's, and how far the
silhouette that they make is that of a reference.

The segmenter is a small U-Net of its own, trained on real renders of the training families only and
never used by the model. How a subject stands is not asked for: the reference's silhouette is laid
over the drawn one in every pose that the world knows (turned, flipped, of another size, at another
place), and the best overlap counts (:func:`best_overlap`).
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ..phase import Phase, autocast, first_makes, shares
from ..world.emoji import Emoji
from ..world.render import UInt8, pool_of, render_scene
from .finder import changed

SIZE = 160  # larger pictures are shrunk before they are looked at
SCENES = 6000  # rendered for training
BATCH = 16
_FIRST_SEED = 400_000_000
SIDES = (60, 160)  # to which half of a batch is shrunk and back
_FOLD = 2  # pixels a side of such a place
_WIDTHS = (24, 48, 96, 128)  # at 80, 40, 20 and 10 places a side
# Of a pose: subjects and references are turned by up to 25 degrees each.
_TURNS = range(-50, 51, 10)  # degrees
_SEARCH = 80  # side of the grid on which poses are compared
_KEPT = 4  # of the poses of the first look, those that are made exact
_STEPS = (  # degrees, logarithm of the size, place as a part of the picture's half
    (5.0, 0.08, 0.06),
    (2.5, 0.04, 0.03),
    (1.25, 0.02, 0.015),
)


class Segmenter(nn.Module):
    """(B,3,160,160) in [-1,1] -> logits (B,160,160) of the pixels that show a subject.

    Four pixels are one place of 80x80 on the way in and on the way out, so that nothing is
    convolved at the picture's own size."""

    def __init__(self) -> None:
        super().__init__()

        def unit(wide: int, out: int, stride: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(wide, out, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())

        first, *deeper = _WIDTHS
        self.first = unit(3 * _FOLD**2, first)
        self.down = nn.ModuleList()
        for wide, out in zip(_WIDTHS, deeper, strict=False):
            self.down.append(nn.Sequential(unit(wide, out, 2), unit(out, out)))
        self.narrow, self.up = nn.ModuleList(), nn.ModuleList()
        for wide, out in zip(_WIDTHS[:0:-1], _WIDTHS[-2::-1], strict=True):
            self.narrow.append(nn.Conv2d(wide, out, 1))
            self.up.append(unit(out, out))
        self.last = nn.Conv2d(first, _FOLD**2, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        seen = [self.first(functional.pixel_unshuffle(pixels, _FOLD))]
        for down in self.down:
            seen.append(down(seen[-1]))
        x = seen.pop()
        for narrow, up in zip(self.narrow, self.up, strict=True):
            beside = seen.pop()
            larger = functional.interpolate(narrow(x), size=beside.shape[-2:], mode="bilinear")
            x = up(larger + beside)
        return functional.pixel_shuffle(self.last(x), _FOLD)[:, 0].float()


def shrunk(picture: NDArray[Any]) -> NDArray[np.float32]:
    """(320,320,...) -> (160,160,...), the mean of each four pixels, as :func:`silhouettes` sees a
    picture. Rendered at 160 its lines and edges would be others."""
    sides = picture.shape[0] // SIZE, picture.shape[1] // SIZE
    blocks = picture.reshape(SIZE, sides[0], SIZE, sides[1], *picture.shape[2:])
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def _load_scenes(emoji: Sequence[Emoji], folder: Path) -> tuple[UInt8, UInt8]:
    """Pictures (SCENES,160,160,3) and the subjects' pixels (SCENES,160,160), 0 or 1. Rendered first
    when missing."""
    pictures_file, masks_file = folder / "outline.npy", folder / "outline_masks.npy"

    def render() -> None:
        pool = pool_of(emoji)
        temporary = pictures_file.with_suffix(".tmp")
        shape = (SCENES, SIZE, SIZE, 3)
        pictures = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        masks = np.zeros((SCENES, SIZE, SIZE), np.uint8)
        for i in range(SCENES):
            scene = render_scene(pool, _FIRST_SEED + i)
            pictures[i] = shrunk(scene.picture).round()
            whole = np.zeros(scene.picture.shape[:2], np.float32)
            for instance in scene.instances:
                whole[instance.mask] = 1
            masks[i] = shrunk(whole) >= 0.5
        pictures.flush()
        os.replace(temporary, pictures_file)
        np.save(masks_file, masks)

    first_makes(masks_file, render)
    return np.load(pictures_file, mmap_mode="r"), np.load(masks_file)


def loss_of_batch(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of logits (B,H,W) for masks (B,H,W) of 0 and 1, and what the soft masks lack of
    the true ones, 1 - 2 |A B| / (|A| + |B|), of the batch as a whole."""
    wrong = functional.binary_cross_entropy_with_logits(logits, masks)
    soft = logits.sigmoid()
    return wrong + 1 - (2 * (soft * masks).sum() + 1) / (soft.sum() + masks.sum() + 1)


def phase(folder: Path) -> Phase:
    """How the segmenter is trained, and where its state lies."""
    return Phase(
        name="outline", folder=folder, steps=2400, learning_rate=2e-3, seed=9, ema=0.99,
        optimiser="muon",
    )  # fmt: skip


def train_outline(emoji: Sequence[Emoji], folder: Path) -> None:
    """Train or resume; renders its own scenes."""
    torch.manual_seed(9)
    network = Segmenter().to(memory_format=torch.channels_last)  # two thirds of the time
    pictures, masks = _load_scenes(emoji, folder)
    part, parts = shares()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(11_000_000 + step * parts + part)
        chosen = [rng.randrange(SCENES) for _ in range(BATCH // parts)]
        pixels = torch.from_numpy(pictures[chosen]).movedim(-1, 1).float() / 127.5 - 1
        wanted = torch.from_numpy(masks[chosen]).float()
        if rng.random() < 0.5:
            pixels, wanted = pixels.flip(-1), wanted.flip(-1)
        pixels = changed(pixels, generator, SIDES).contiguous(memory_format=torch.channels_last)
        with autocast():
            logits = network(pixels)
        return loss_of_batch(logits, wanted)

    phase(folder).run(network, loss_of)


def load_outline(folder: Path) -> Segmenter:
    """The segmenter as the phase left it."""
    network = Segmenter()
    phase(folder).load(network)
    return network.requires_grad_(False)


@torch.no_grad()
def silhouettes(network: Segmenter, pictures: Tensor) -> Tensor:
    """Pictures (B,3,H,W) in [-1,1] -> which pixels show a subject, (B,160,160) bool: what the
    network says of a picture and of its mirror image, together."""
    small = functional.interpolate(pictures, size=(SIZE, SIZE), mode="area")
    return network(small) + network(small.flip(-1)).flip(-1) > 0


def best_overlap(drawn: Tensor, reference: Tensor) -> float:
    """Intersection over union of the silhouette ``drawn`` (h,w) bool and ``reference`` (H,W) bool,
    turned by up to 50 degrees, flipped or not, of any size and at any place: the best of those
    poses. What of the posed reference lies outside of the drawn picture does not count. 0 where
    either is empty; both pictures are squares, of any sizes."""
    if not drawn.any() or not reference.any():
        return 0.0
    side = (_SEARCH, _SEARCH)
    wanted = functional.interpolate(drawn[None, None].float(), size=side, mode="area")
    # Of twice that size, for poses are read off it bilinearly, four of its places for each.
    doubled = (2 * _SEARCH, 2 * _SEARCH)
    given = functional.interpolate(reference[None, None].float(), size=doubled, mode="area")
    middle, given_middle = _middle(drawn), _middle(reference)
    share = drawn.float().mean() / reference.float().mean()
    size = 0.5 * float(share.log())
    first = [(float(turn), flip, size, *middle) for flip in (1.0, -1.0) for turn in _TURNS]
    poses = torch.tensor(first)
    overlaps = _overlaps(wanted, given, poses, given_middle)
    chosen = overlaps.topk(_KEPT).indices
    poses, best = poses[chosen], overlaps[chosen]
    for turn, scale, place in _STEPS:
        moves = torch.diag(torch.tensor([turn, 0.0, scale, place, place]))[[0, 2, 3, 4]]
        moves = torch.cat((moves, -moves))  # (8,5)
        for _ in range(6):
            near = poses[:, None] + moves  # (K,8,5)
            found = _overlaps(wanted, given, near.flatten(0, 1), given_middle).view(_KEPT, -1)
            value, which = found.max(dim=1)
            better = value > best
            if not better.any():
                break
            poses = torch.where(better[:, None], near[torch.arange(_KEPT), which], poses)
            best = torch.maximum(best, value)
    return float(best.max())


def _middle(mask: Tensor) -> tuple[float, float]:
    """Centre of a mask (H,W) bool as (x,y) in [-1,1]."""
    y, x = torch.nonzero(mask, as_tuple=True)
    height, width = mask.shape
    return (
        float((2 * x + 1).float().mean()) / width - 1,
        float((2 * y + 1).float().mean()) / height - 1,
    )


def _overlaps(wanted: Tensor, given: Tensor, poses: Tensor, middle: tuple[float, float]) -> Tensor:
    """(K): intersection over union of wanted (1,1,h,w) with given (1,1,H,W) in each of the poses
    (K,5): degrees, 1 or -1 for flipped, logarithm of the size, centre (x,y)."""
    turn, flip, size, x, y = poses.unbind(dim=1)
    angle, scale = turn.deg2rad(), (-size).exp()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # From places of the drawn picture to places of the reference's.
    rows = torch.stack((flip * cos, -flip * sin, sin, cos), dim=1).view(-1, 2, 2)
    centre = torch.stack((x, y), dim=1)[..., None]  # (K,2,1)
    shift = torch.tensor(middle)[None, :, None] - rows @ centre
    grid = functional.affine_grid(
        torch.cat((rows, shift), dim=2), [len(poses), 1, *wanted.shape[-2:]], align_corners=False
    )
    posed = functional.grid_sample(
        given.expand(len(poses), -1, -1, -1), grid, mode="bilinear", align_corners=False
    )
    both = torch.minimum(posed, wanted).sum(dim=(1, 2, 3))
    either = torch.maximum(posed, wanted).sum(dim=(1, 2, 3))
    return both / either
