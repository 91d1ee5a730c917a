"""The world as training data of :mod:`anystory_core.training` (schema: its ``data`` module).

``pairs``: one subject in a place, and a reference of it in about the same pose and another light,
on white or in another place (RGBA, alpha = mask), with where it is in the target. ``scenes``: one
to three subjects with their visible masks. Half of the captions say "an object" for every name.
Shards are uncompressed tar files.
"""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from anystory_core.data import shards
from anystory_core.data.shards import Files

from .emoji import Emoji
from .render import Scene, pool_of, render_reference, render_scene

SHARD = 500
_PLAIN = 0.5
_FIRST_SEED = {"pairs": 100_000_000, "scenes": 200_000_000}
_SAMPLE_OFFSET = 500_000_000
Kind = Literal["pairs", "scenes"]


def pair_files(scene: Scene, seed: int, caption: str) -> Files:
    """Files of a pair sample from a scene with one subject."""
    (instance,) = scene.instances
    picture, mask = render_reference(instance.emoji, seed, pose=instance.pose)
    alpha = (mask * np.uint8(255))[..., None]
    return shards.pair_files(
        reference=np.concatenate((picture, alpha), axis=-1),
        target=scene.picture,
        target_mask=instance.mask,
        caption=caption,
    )


def scene_files(scene: Scene, caption: str) -> Files:
    """Files of a scene sample."""
    masks = [instance.mask for instance in scene.instances]
    return shards.scene_files(image=scene.picture, masks=masks, caption=caption)


def count_and_caption(kind: Kind, seed: int) -> tuple[int, bool]:
    """How many subjects a sample shows, and whether its caption says "an object" for each; not
    drawn from the numbers that choose who they are."""
    rng = random.Random(seed + _SAMPLE_OFFSET)
    count = 1 if kind == "pairs" else rng.choice((1, 2, 2, 3))
    return count, rng.random() < _PLAIN


def write_samples(emoji: Sequence[Emoji], folder: Path, kind: Kind, number: int) -> None:
    """Write shard ``folder/kind-NUMBER.tar``; nothing is done when it lies there."""
    target = folder / f"{kind}-{number:05d}.tar"
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pool = pool_of(emoji)
    with tarfile.open(target.with_suffix(".tmp"), "w") as tar:
        for i in range(SHARD):
            seed = _FIRST_SEED[kind] + number * SHARD + i
            count, plain = count_and_caption(kind, seed)
            scene = render_scene(pool, seed, subjects=count)
            caption = scene.plain_caption if plain else scene.caption
            if kind == "pairs":
                files = pair_files(scene, seed + 50_000_000, caption)
            else:
                files = scene_files(scene, caption)
            for suffix, content in files.items():
                entry = tarfile.TarInfo(f"{number:05d}{i:04d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    os.replace(target.with_suffix(".tmp"), target)
