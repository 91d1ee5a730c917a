"""What every row is asked for: held-out subjects in held-out scenes, from fixed seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from anystory_core.subject.preprocess import mask_box

from ..world.emoji import Emoji, load_emoji, split
from ..world.render import Bool, Scene, UInt8, pool_of, render_reference, render_scene

_FIRST_SEED = {1: 910_000_000, 2: 920_000_000, 3: 930_000_000}
_REFERENCE_OFFSET = 50_000_000


@dataclass(frozen=True)
class Task:
    """One sample of a row. ``subjects`` are numbers in the list that the task was made for, of
    held-out subjects or of training ones; the scene gives captions, the place, a layout and, for
    routing, the picture itself."""

    number: int
    scene: Scene
    subjects: tuple[int, ...]
    references: tuple[tuple[UInt8, Bool], ...]

    def caption(self, kind: str) -> str:
        """ "named" or "plain" (with "an object" for every name)."""
        return self.scene.caption if kind == "named" else self.scene.plain_caption

    def names(self) -> list[str]:
        """What the subjects are called in the caption with names."""
        return [instance.emoji.name for instance in self.scene.instances]

    def masks(self) -> Tensor:
        """Visible masks (N,H,W) float."""
        return torch.stack([torch.from_numpy(i.mask) for i in self.scene.instances]).float()

    def boxes(self) -> Tensor:
        """The boxes of the masks as masks (N,H,W): what a user would paint, without the outline."""
        out: list[Tensor] = []
        for mask in self.masks() > 0.5:
            top, bottom, left, right = mask_box(mask)
            box = torch.zeros(mask.shape)
            box[top:bottom, left:right] = 1
            out.append(box)
        return torch.stack(out)

    def noise(self, shape: Sequence[int], salt: int = 0) -> Tensor:
        """Gaussian noise that belongs to this task, the same in every row."""
        seed = _FIRST_SEED[len(self.subjects)] + self.number + 7_000_003 * salt
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def held_out_subjects(sources: Path) -> list[Emoji]:
    """One emoji of each held-out family: its plainest variant, in the order of families."""
    held = split(load_emoji(sources))[1]
    return [min(family, key=lambda e: (len(e.code), e.code)) for family in pool_of(held)]


@lru_cache(maxsize=4096)
def _task(subjects: tuple[Emoji, ...], count: int, number: int) -> Task:
    seed = _FIRST_SEED[count] + number
    scene = render_scene([[s] for s in subjects], seed, subjects=count)
    index = {emoji.code: i for i, emoji in enumerate(subjects)}
    return Task(
        number,
        scene,
        tuple(index[i.emoji.code] for i in scene.instances),
        tuple(
            render_reference(i.emoji, seed + _REFERENCE_OFFSET + 10_000_000 * n)
            for n, i in enumerate(scene.instances)
        ),
    )


def task(subjects: Sequence[Emoji], count: int, number: int) -> Task:
    """Task ``number`` with ``count`` subjects."""
    return _task(tuple(subjects), count, number)


def training_subjects(sources: Path) -> list[Emoji]:
    """As many of the training families as are held out, one emoji of each, always the same."""
    trained, held = split(load_emoji(sources))
    families = random.Random(0).sample(pool_of(trained), len(pool_of(held)))
    return [min(family, key=lambda e: (len(e.code), e.code)) for family in families]
