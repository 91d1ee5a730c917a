"""Rendered scenes on disk, in shards that later phases read.

Of each scene: the picture, two captions, and a reference of each of its subjects, cut out as the
pack cuts it, with the place of that subject on the latent's grid. A scene is a function of its
seed, so shards can be thrown away and made again, and more of them added at any time.

References show their subject in the scene's pose, but for a few degrees and the light. Were it
turned and mirrored against them at random, a picture under much noise might be any of those poses:
a small network learns their mean, which is a blob of the right colours (docs/mini.md).
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anystory_core.mini.config import CONFIG
from anystory_core.subject.preprocess import prepare_views

from .emoji import Emoji
from .render import MOST_SUBJECTS, SIZE, Scene, UInt8, pool_of, render_reference, render_scene

SHARD = 500
FIRST_SEED = 50_000_000
_REFERENCE_OFFSET = 350_000_000
_NEXT_SUBJECT = 20_000_000
_LAYOUT_OFFSET = 700_000_000
_SHARES = (0.04, 0.56, 0.28, 0.12)  # of scenes with 0 to 3 subjects
# Two thirds of the scenes are composed: where a subject may be anywhere, what is drawn under much
# noise is the mean of its places.
_SPREADS = (0.4, 0.4, 1.0)


@dataclass(frozen=True)
class Shard:
    """``SHARD`` scenes, two captions each. Mapped from disk, uint8: pictures (SHARD,H,W,3); of up
    to N = ``MOST_SUBJECTS`` subjects, in random order, cut-outs (SHARD,N,R,R,3), R as
    :func:`reference_size` says, and regions (SHARD,N,H/8,W/8) where 255 is the subject; all 0 where
    there is none."""

    number: int
    pictures: UInt8
    cutouts: UInt8
    regions: UInt8
    captions: list[str]
    plain_captions: list[str]


def _paths(folder: Path, number: int) -> list[Path]:
    kinds = ("pictures.npy", "cutouts.npy", "regions.npy", "json")
    return [folder / f"{number:05d}.{kind}" for kind in kinds]


def folder_of(work: Path, kind: str, size: int) -> Path:
    """Where the "scenes" or the "cache" of pictures of this size lie in the recipe's folder."""
    return work / (kind if size == SIZE else f"{kind}-{size}")


def reference_size(size: int) -> int:
    """Side of the references of pictures of this size: the ReferenceNet's own at the mini model's
    size, and at smaller ones as much smaller, up to the next multiple of 64."""
    return 64 * -(-CONFIG.reference.size * size // (64 * SIZE))


def training_scene(pool: Sequence[Sequence[Emoji]], seed: int, size: int) -> Scene:
    """A scene that is mostly of one subject, and mostly composed."""
    rng = random.Random(seed + _LAYOUT_OFFSET)  # of -seed it would be the scene's own numbers
    (subjects,) = rng.choices(range(4), _SHARES)
    return render_scene(pool, seed, subjects=subjects, size=size, spread=rng.choice(_SPREADS))


def cut_references(scene: Scene, seed: int) -> tuple[UInt8, UInt8]:
    """(cut-outs (N,R,R,3), regions (N,H/8,W/8)) of a scene's subjects, in an order of the seed."""
    height, width = (side // 8 for side in scene.picture.shape[:2])
    side = reference_size(scene.picture.shape[0])
    config = dataclasses.replace(CONFIG, reference=dataclasses.replace(CONFIG.reference, size=side))
    cutouts = np.zeros((MOST_SUBJECTS, side, side, 3), np.uint8)
    regions = np.zeros((MOST_SUBJECTS, height, width), np.uint8)
    order = list(scene.instances)
    random.Random(seed).shuffle(order)
    for number, instance in enumerate(order):
        own = seed + number * _NEXT_SUBJECT
        picture, mask = render_reference(instance.emoji, own, pose=instance.pose)
        image, subject = torch.from_numpy(picture / np.float32(255)), torch.from_numpy(mask)
        (cutouts[number],) = prepare_views(
            image[None], subject[None].float(), config
        ).cutout.numpy()
        share = instance.mask.reshape(height, 8, width, 8).mean(axis=(1, 3))
        regions[number] = np.round(255 * share)
    return cutouts, regions


def write_shard(emoji: list[Emoji], folder: Path, number: int, size: int = SIZE) -> None:
    """Render one shard of pictures of this size; nothing is done when it lies there."""
    *files, captions_file = _paths(folder, number)
    if captions_file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pool = pool_of(emoji)
    seeds = range(FIRST_SEED + number * SHARD, FIRST_SEED + (number + 1) * SHARD)
    scenes = [training_scene(pool, seed, size) for seed in seeds]
    pairs = zip(scenes, seeds, strict=True)
    cuts = [cut_references(scene, seed + _REFERENCE_OFFSET) for scene, seed in pairs]
    cutouts, regions = zip(*cuts, strict=True)
    for file, arrays in zip(files, ([s.picture for s in scenes], cutouts, regions), strict=True):
        np.save(file, np.stack(arrays))
    texts = [{"caption": s.caption, "plain": s.plain_caption} for s in scenes]
    temporary = captions_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(texts))
    os.replace(temporary, captions_file)


def read_shard(folder: Path, number: int) -> Shard:
    """A shard that :func:`write_shard` wrote."""
    *files, captions_file = _paths(folder, number)
    texts: list[dict[str, Any]] = json.loads(captions_file.read_text())
    pictures, cutouts, regions = (np.load(file, mmap_mode="r") for file in files)
    return Shard(
        number,
        pictures,
        cutouts,
        regions,
        [str(t["caption"]) for t in texts],
        [str(t["plain"]) for t in texts],
    )


def shard_numbers(folder: Path) -> list[int]:
    """Shards that are complete, in order."""
    return sorted(int(file.stem) for file in folder.glob("*.json"))
