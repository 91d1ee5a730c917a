"""Scenes of the mini world, from a seed: subjects in a place, with exact masks and a caption.

Everything is a function of ``(emoji, seed)``. Pictures are uint8 RGB (H,W,3); masks are bool (H,W),
the visible part of each instance.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from anystory_core.mini.config import PICTURE_SIZE

from .backgrounds import PLACES, draw_place
from .emoji import Emoji

SIZE = PICTURE_SIZE
UInt8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]
MOST_SUBJECTS = 3
# Side of a subject relative to the picture, by the number of subjects in it.
_SCALES = {1: (0.5, 0.85), 2: (0.42, 0.56), 3: (0.34, 0.44)}
_MOST_HIDDEN = 0.35  # a subject that others cover more than this is placed anew
_MOST_TILT = 25.0  # degrees, either way
_NEAR = 6.0  # how much of it lies between two pictures of a subject in one pose


@dataclass(frozen=True)
class Pose:
    """How a subject is shown: turned counter-clockwise by ``angle`` degrees after it was mirrored,
    if it was ``flipped``."""

    angle: float
    flipped: bool

    def near(self, rng: random.Random) -> Pose:
        """The same but for a few degrees."""
        return Pose(self.angle + rng.uniform(-_NEAR, _NEAR), self.flipped)


@dataclass(frozen=True)
class Instance:
    """One subject in a scene."""

    emoji: Emoji
    mask: Bool
    pose: Pose


@dataclass(frozen=True)
class Scene:
    """A picture, what is in it, where it is, and two captions of it."""

    picture: UInt8
    instances: tuple[Instance, ...]
    place: str
    caption: str
    plain_caption: str  # the same with "an object" for every name


def transformed(
    emoji: Emoji, rng: random.Random, side: int, pose: Pose | None = None
) -> tuple[Image.Image, Pose]:
    """A subject in ``pose``, or in any, and relit: (RGBA of about ``side``, pose)."""
    if pose is None:
        flipped = rng.random() < 0.5
        pose = Pose(rng.uniform(-_MOST_TILT, _MOST_TILT), flipped)
    sprite = emoji.sprite()
    if pose.flipped:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
    sprite = sprite.rotate(pose.angle, Image.Resampling.BICUBIC, expand=True)
    alpha = sprite.getchannel("A")
    colour = ImageEnhance.Brightness(sprite.convert("RGB")).enhance(rng.uniform(0.82, 1.15))
    colour = ImageEnhance.Contrast(colour).enhance(rng.uniform(0.88, 1.12))
    colour = ImageEnhance.Color(colour).enhance(rng.uniform(0.85, 1.15))
    colour.putalpha(alpha)
    return colour, pose


def solid_box(sprite: Image.Image) -> tuple[int, int, int, int] | None:
    """Box of what is more than half opaque in an RGBA picture; None when nothing is."""
    return Image.fromarray(np.asarray(sprite.getchannel("A")) > 127).getbbox()


def render_scene(
    pool: Sequence[Sequence[Emoji]],
    seed: int,
    *,
    subjects: int | None = None,
    size: int = SIZE,
    spread: float = 1.0,
) -> Scene:
    """A scene with 0-3 subjects of different families, or as many as ``subjects`` says.

    ``pool`` holds one list of variants per family, so that families are equally likely. ``spread``,
    in [0,1]: how far from the middle of its part of the picture a subject may be."""
    rng = random.Random(seed)
    count = rng.choices((0, 1, 2, 3), (0.06, 0.44, 0.32, 0.18))[0] if subjects is None else subjects
    chosen = [rng.choice(family) for family in rng.sample(list(pool), count)]
    place = rng.choice(list(PLACES))
    canvas = draw_place(place, rng, size).convert("RGBA")
    slots = _slots(count, rng, spread)
    order = list(range(count))
    rng.shuffle(order)
    picture, masks, poses = _compose(canvas, chosen, slots, order, rng, size, 0)
    for attempt in range(1, 12):
        if _visible_enough(masks):
            break
        picture, masks, poses = _compose(canvas, chosen, slots, order, rng, size, attempt)
    instances = tuple(
        Instance(emoji, visible, pose)
        for emoji, (visible, _), pose in zip(chosen, masks, poses, strict=True)
    )
    caption, plain = captions([i.emoji.name for i in instances], [s[0] for s in slots], place, rng)
    return Scene(picture, instances, place, caption, plain)


def _slots(count: int, rng: random.Random, spread: float) -> list[tuple[float, float]]:
    """Centres (x,y) in [0,1], spread over the width, in random order."""
    centres = [
        (
            (i + 0.5 + spread * rng.uniform(-0.25, 0.25)) / count,
            0.55 + spread * rng.uniform(-0.17, 0.17),
        )
        for i in range(count)
    ]
    rng.shuffle(centres)
    return centres


def _compose(
    canvas: Image.Image,
    chosen: Sequence[Emoji],
    slots: Sequence[tuple[float, float]],
    order: Sequence[int],
    rng: random.Random,
    size: int,
    attempt: int,
) -> tuple[UInt8, list[tuple[Bool, int]], list[Pose]]:
    """Paste all subjects back to front: (picture, [(visible mask, whole area)], poses)."""
    picture = canvas.copy()
    alphas: dict[int, UInt8] = {}
    poses: dict[int, Pose] = {}
    for index in order:
        low, high = _SCALES[len(chosen)]
        side = round(size * rng.uniform(low, high) * 0.96**attempt)
        sprite, pose = transformed(chosen[index], rng, side)
        x = round(slots[index][0] * size - sprite.width / 2)
        y = round(slots[index][1] * size - sprite.height / 2)
        x = min(max(x, -sprite.width // 10), size - sprite.width * 9 // 10)
        y = min(max(y, -sprite.height // 10), size - sprite.height * 9 // 10)
        layer = Image.new("RGBA", picture.size)
        layer.paste(sprite, (x, y))
        picture = Image.alpha_composite(picture, layer)
        alphas[index] = np.asarray(layer.getchannel("A"))
        poses[index] = pose
    covered = np.zeros((size, size), bool)
    visible: dict[int, tuple[Bool, int]] = {}
    for index in reversed(order):
        inside = alphas[index] > 127
        visible[index] = (inside & ~covered, int(inside.sum()))
        covered |= inside
    numbers = range(len(chosen))
    rgb = np.asarray(picture.convert("RGB"))
    return rgb, [visible[i] for i in numbers], [poses[i] for i in numbers]


def _visible_enough(masks: Sequence[tuple[Bool, int]]) -> bool:
    return all(visible.sum() > (1 - _MOST_HIDDEN) * whole for visible, whole in masks)


def render_reference(
    emoji: Emoji,
    seed: int,
    *,
    size: int = SIZE,
    plain: bool | None = None,
    pose: Pose | None = None,
) -> tuple[UInt8, Bool]:
    """A reference of a subject: its picture near ``pose``, or in one of its own, in a light of its
    own, on white or in some place."""
    rng = random.Random(seed)
    white = rng.random() < 0.5 if plain is None else plain
    if white:
        canvas = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    else:
        canvas = draw_place(rng.choice(list(PLACES)), rng, size).convert("RGBA")
    side = round(size * rng.uniform(0.55, 0.8))
    sprite, _ = transformed(emoji, rng, side, pose and pose.near(rng))
    x = (size - sprite.width) // 2 + rng.randint(-size // 16, size // 16)
    y = (size - sprite.height) // 2 + rng.randint(-size // 16, size // 16)
    layer = Image.new("RGBA", (size, size))
    layer.paste(sprite, (x, y))
    picture = Image.alpha_composite(canvas, layer).convert("RGB")
    return np.asarray(picture), np.asarray(layer.getchannel("A")) > 127


def captions(
    names: Sequence[str], places_x: Sequence[float], place: str, rng: random.Random
) -> tuple[str, str]:
    """(caption with names, the same caption with "an object" for each name)."""
    at = {
        "beach": "on the", "snowy field": "in a", "desert": "in the", "meadow": "in a",
        "mountains": "in the", "kitchen": "in a", "room": "in a", "sea": "by the",
        "space": "in", "sunset": "at", "underwater world": "in an", "autumn park": "in an",
        "night city": "in a", "forest": "in a",
    }[place] + f" {place}"  # fmt: skip
    lead = rng.choice(("", "a picture of ", "a photo of ", "an image showing ", "here is "))
    words = [_with_article(name) for name in names]
    if not names:
        text = rng.choice(("{lead}an empty {place}", "nothing but a {place}", "{lead}a {place}"))
        filled = text.format(lead=lead, place=place)
        return filled, filled
    order = sorted(range(len(names)), key=lambda i: places_x[i])
    slot = [f"<{i}>" for i in range(len(names))]
    if len(names) == 1:
        form = rng.choice(("{l}{a} {at}", "{l}{a} {at}", "{at}, {a}", "{a}, {at}"))
        text = form.format(l=lead, a=slot[0], at=at)
    elif len(names) == 2:
        left, right = slot[order[0]], slot[order[1]]
        form = rng.choice(
            (
                "{l}{a} and {b} {at}",
                "{l}{a} next to {b} {at}",
                "{l}{left} to the left of {right} {at}",
                "{l}{right} to the right of {left}, {at}",
                "{at}, {a} with {b}",
            )
        )
        text = form.format(l=lead, a=slot[0], b=slot[1], left=left, right=right, at=at)
    else:
        a, b, c = (slot[i] for i in order)
        form = rng.choice(("{l}{a}, {b} and {c} {at}", "{at}, {a} beside {b} and {c}"))
        text = form.format(l=lead, a=a, b=b, c=c, at=at)
    named, plain = text, text
    for i, word in enumerate(words):
        named = named.replace(slot[i], word)
        plain = plain.replace(slot[i], "an object")
    return named, plain


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def pool_of(emoji: Sequence[Emoji]) -> list[list[Emoji]]:
    """Variants by family, in a fixed order."""
    families: dict[str, list[Emoji]] = {}
    for item in emoji:
        families.setdefault(item.family, []).append(item)
    return [families[name] for name in sorted(families)]
