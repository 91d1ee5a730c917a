"""Rendered scenes on disk, in shards that later phases read: pictures (.npy) and captions (.json).

A scene is a function of its seed, so shards can be thrown away and made again, and more of them
added at any time.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .emoji import Emoji
from .world import UInt8, pool_of, render_scene

SHARD = 500
FIRST_SEED = 50_000_000


@dataclass(frozen=True)
class Shard:
    """``SHARD`` scenes: pictures uint8 (SHARD,H,W,3) mapped from disk, two captions each."""

    number: int
    pictures: UInt8
    captions: list[str]
    plain_captions: list[str]


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:05d}.npy", folder / f"{number:05d}.json"


def write_shard(emoji: list[Emoji], folder: Path, number: int) -> None:
    """Render one shard; nothing is done when it lies there."""
    pictures_file, captions_file = _paths(folder, number)
    if captions_file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pool = pool_of(emoji)
    scenes = [render_scene(pool, FIRST_SEED + number * SHARD + i) for i in range(SHARD)]
    np.save(pictures_file, np.stack([scene.picture for scene in scenes]))
    texts = [{"caption": s.caption, "plain": s.plain_caption, "place": s.place} for s in scenes]
    temporary = captions_file.with_suffix(".tmp")
    temporary.write_text(json.dumps(texts))
    os.replace(temporary, captions_file)


def read_shard(folder: Path, number: int) -> Shard:
    """A shard that :func:`write_shard` wrote."""
    pictures_file, captions_file = _paths(folder, number)
    texts: list[dict[str, Any]] = json.loads(captions_file.read_text())
    return Shard(
        number,
        np.load(pictures_file, mmap_mode="r"),
        [str(t["caption"]) for t in texts],
        [str(t["plain"]) for t in texts],
    )


def shard_numbers(folder: Path) -> list[int]:
    """Shards that are complete, in order."""
    return sorted(int(file.stem) for file in folder.glob("*.json"))
