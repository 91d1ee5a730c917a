"""What the measuring networks say of a drawn picture: who is where, in which place, in what pose.

They see generated pixels and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..measuring import eye
from ..measuring.finder import SIZE as SEEN
from ..measuring.finder import Finder, Found, box_of, find
from ..measuring.identity import SIZE, Identity, gallery
from ..measuring.networks import read_networks, read_segmenter
from ..measuring.outline import Segmenter, best_overlap, silhouettes
from ..networks.vae import to_signed
from ..world.emoji import Emoji
from ..world.render import UInt8, render_scene, solid_box
from . import measures
from .tasks import Task

_ROOM = 1.12  # side of a crop over the longer side of the found box
_RENDERS = 24
_ANGLES = range(-24, 25, 6)
_POSE_SIDE = 32


@dataclass(frozen=True)
class Verdict:
    """One picture's answers."""

    names: tuple[int, ...]  # nearest held-out subject of each found place, warmest first
    all_right: bool  # each wanted subject is the name of exactly one place
    best_right: bool  # the warmest place is named after the first wanted subject
    blended: bool
    place_right: bool
    same_pose: bool | None  # one subject only, and only when it is named right
    # One subject only: the independent eye's answer, and how far the silhouette is the reference's
    # and, for scale, that of the next task of those that are judged together, if there is one.
    eye_right: bool | None = None
    outline: float | None = None
    other_outline: float | None = None


@dataclass(frozen=True)
class Judge:
    """The networks, and the subjects that pictures are named after."""

    finder: Finder
    identity: Identity
    subjects: tuple[Emoji, ...]

    @classmethod
    def load(cls, subjects: Sequence[Emoji]) -> Judge:
        """With the networks of :mod:`..measuring.networks`."""
        return cls(*read_networks(), tuple(subjects))

    @cached_property
    def gallery(self) -> Tensor:
        """Unit vectors (subjects,128) of real renders. Made when a picture is first judged, for it
        takes a minute and rows of routing need none."""
        return gallery(self.identity, self.subjects, self.grounds, _RENDERS, 950_000_000)

    @cached_property
    def grounds(self) -> list[UInt8]:
        """Scenes of no subject, over which real renders are laid."""
        pool = [[s] for s in self.subjects]
        return [render_scene(pool, 940_000_000 + i, subjects=0).picture for i in range(40)]

    @cached_property
    def segmenter(self) -> Segmenter:
        """Read when a picture of one subject is first judged."""
        return read_segmenter()

    @cached_property
    def _eye(self) -> tuple[eye.Eye, Tensor]:
        """The eye, and what it knows of the subjects: (subjects,1280)."""
        seeing = eye.Eye()
        return seeing, eye.known(seeing, self.subjects, self.grounds, 960_000_000, _ROOM)

    @torch.no_grad()
    def embed(self, picture: Tensor, found: Sequence[Found]) -> Tensor:
        """Unit vectors (P,128) of the found places of a picture (3,H,W)."""
        crops = [cut(picture, one.box) for one in found]
        return cast(Any, self.identity)(torch.stack(crops))

    def look(self, picture: Tensor) -> tuple[list[Found], str]:
        """The found places of a picture (3,H,W) in [-1,1], warmest first, and the named one that it
        shows."""
        seen = functional.interpolate(picture[None], size=(SEEN, SEEN), mode="area")
        return find(self.finder, seen)[0]

    def judge(self, pictures: Tensor, tasks: Sequence[Task]) -> list[Verdict]:
        """Pictures (B,3,H,W) in [-1,1] of as many tasks; seen at the networks' own sizes."""
        whole, pictures = pictures, functional.interpolate(pictures, size=(SEEN, SEEN), mode="area")
        out: list[Verdict] = []
        for number, (picture, task, (found, place)) in enumerate(
            zip(pictures, tasks, find(self.finder, pictures), strict=True)
        ):
            names: list[int] = []
            mixed, pose = False, None
            if found:
                seen = self.embed(picture, found)
                names = measures.top1(seen, self.gallery)
                mixed = measures.blended(seen, self.gallery[list(task.subjects)])
            right = bool(names) and names[0] == task.subjects[0]
            alone = len(task.subjects) == 1
            if right and alone:
                pose = self.same_pose(cut(picture, found[0].box), task)
            own = other = None
            if alone:
                after = [tasks[(number + 1) % len(tasks)]] * (len(tasks) > 1)
                own, *others = self.outlines(whole[number], (task, *after))
                other = others[0] if others else None
            out.append(
                Verdict(
                    tuple(names),
                    measures.all_found(names, task.subjects),
                    right,
                    mixed,
                    place == task.scene.place,
                    pose,
                    self.seen_right(whole[number], found, task) if alone else None,
                    own,
                    other,
                )
            )
        return out

    def seen_right(self, picture: Tensor, found: Sequence[Found], task: Task) -> bool:
        """The independent eye names the warmest found place of a picture (3,H,W), or all of it if
        none is found, after the task's first subject."""
        seeing, known = self._eye
        crop = cut(picture, found[0].box if found else (0.0, 0.0, 1.0, 1.0), eye.SIZE)
        return measures.top1(seeing(crop[None]), known) == [task.subjects[0]]

    def outlines(self, picture: Tensor, tasks: Sequence[Task]) -> list[float]:
        """Overlap, 0 to 1, of the silhouette in a picture (3,H,W) with that of each task's first
        reference in its best pose."""
        (drawn,) = silhouettes(self.segmenter, picture[None])
        return [best_overlap(drawn, torch.from_numpy(task.references[0][1])) for task in tasks]

    def same_pose(self, crop: Tensor, task: Task) -> bool:
        """The subject stands as it does in the reference, by the same estimate of both."""
        emoji = self.subjects[task.subjects[0]]
        picture, mask = task.references[0]
        (pixels,) = to_signed(torch.from_numpy(picture.copy())[None])
        reference = cut(pixels, box_of(mask))
        return measures.pose_matches(*pose_of(crop, emoji), *pose_of(reference, emoji))


def cut(picture: Tensor, box: tuple[float, float, float, float], size: int = SIZE) -> Tensor:
    """The square around a box of a picture (3,H,W), at the identity network's size or another; what
    lies outside the picture repeats its border."""
    left, top, right, bottom = box
    side = max(right - left, bottom - top) * _ROOM
    x, y = (left + right) / 2, (top + bottom) / 2
    at = (torch.arange(size) + 0.5) / size - 0.5
    ys, xs = torch.meshgrid(2 * (y + at * side) - 1, 2 * (x + at * side) - 1, indexing="ij")
    grid = torch.stack((xs, ys), dim=-1)[None]
    return functional.grid_sample(
        picture[None], grid, mode="bilinear", padding_mode="border", align_corners=False
    )[0]


@lru_cache(maxsize=256)
def _poses(emoji: Emoji) -> tuple[list[tuple[float, bool]], Tensor]:
    """Poses and their renders: RGBA (K,4,32,32), colours in [-1,1]."""
    poses: list[tuple[float, bool]] = []
    renders: list[Tensor] = []
    for flipped in (False, True):
        for angle in _ANGLES:
            sprite = emoji.sprite()
            if flipped:
                sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            sprite = sprite.rotate(angle, Image.Resampling.BICUBIC, expand=True)
            sprite = sprite.crop(solid_box(sprite))
            side = round(max(sprite.size) * _ROOM)
            canvas = Image.new("RGBA", (side, side))
            canvas.paste(sprite, ((side - sprite.width) // 2, (side - sprite.height) // 2))
            small = canvas.resize((_POSE_SIDE, _POSE_SIDE), Image.Resampling.BOX)
            pixels = torch.from_numpy(np.asarray(small).copy()).movedim(-1, 0).float()
            renders.append(torch.cat((pixels[:3] / 127.5 - 1, pixels[3:] / 255)))
            poses.append((float(angle), flipped))
    return poses, torch.stack(renders)


def pose_of(crop: Tensor, emoji: Emoji) -> tuple[float, bool]:
    """(angle in degrees, flipped): the render that a crop (3,S,S) is nearest to inside its
    outline."""
    poses, renders = _poses(emoji)
    small = functional.interpolate(crop[None], size=(_POSE_SIDE, _POSE_SIDE), mode="area")
    inside = renders[:, 3:]
    error = ((renders[:, :3] - small).square() * inside).sum(dim=(1, 2, 3))
    return poses[int((error / inside.sum(dim=(1, 2, 3))).argmin())]
