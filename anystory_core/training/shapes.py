"""Targets of other shapes than squares: buckets of one area, and which picture goes into which."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.index import Entry
from ..data.parts import PICTURES, views_of_group
from .order import Positions
from .samples import Pools, Samples

Shape = tuple[int, int]  # height, width in pixels

_STEP = 32  # a latent pixel is 8, and the U-Net halves latents twice
_MOST = 2.0  # longest side over the square's
_HEAD = 2**18  # bytes that hold a picture's size; EXIF and profiles come before it
_TURNED = range(5, 9)  # EXIF orientations that swap the sides
_ORIENTATION = 0x0112
_KEYS = 1000  # of samples that tell data from other data

Sizes = np.ndarray[Any, np.dtype[np.int32]]


def bucket_shapes(resolution: int) -> tuple[Shape, ...]:
    """Shapes of about ``resolution`` squared pixels, never more, whose sides are multiples of 64 at
    1024 and of 32 below, up to twice as long as the square's; SDXL's own at 1024, less the longest.
    """
    step = _STEP * max(1, round(2 * resolution / 1024))
    shapes: set[Shape] = set()
    for short in range(step, resolution + 1, step):
        long = resolution * resolution // short // step * step
        if short <= long <= _MOST * resolution:
            shapes |= {(long, short), (short, long)}
    return tuple(sorted(shapes))


def nearest(size: Shape, shapes: Sequence[Shape]) -> int:
    """The number of the shape that keeps most of a picture of this (height, width)."""
    aspect = math.log(size[0] / size[1])
    distances = [abs(aspect - math.log(height / width)) for height, width in shapes]
    return distances.index(min(distances))


def picture_size(entry: Entry) -> Shape | None:
    """(height, width) of a sample's target, or of a group's first view, upright, from its file's
    head; None where it cannot be told, which reading the sample will say."""
    views = views_of_group(entry.files)
    stem = views[0] if views else "target" if entry.kind == "pair" else "image"
    for extension in PICTURES:
        place = entry.files.get(f"{stem}.{extension}")
        if place is None:
            continue
        size = _HEAD if place.size < 0 else min(place.size, _HEAD)
        try:
            with Image.open(io.BytesIO(dataclasses.replace(place, size=size).read())) as picture:
                width, height = picture.size
                turned = picture.getexif().get(_ORIENTATION) in _TURNED
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        return (width, height) if turned else (height, width)
    return None


def sizes_of(samples: Samples, positions: Positions, file: Path) -> Sizes:
    """(height, width) of the samples at ``positions`` (P,2), 0 where they cannot be told; kept in
    ``file``, because a million of them take minutes."""
    some = positions[np.linspace(0, len(positions) - 1, _KEYS).astype(np.int64)]
    digest = hashlib.sha256("\n".join(samples[int(p)].key for p in some).encode()).hexdigest()
    if file.exists():
        with np.load(file) as kept:
            if str(kept["data"]) == digest and np.array_equal(kept["positions"], positions):
                return kept["sizes"]
    found = [picture_size(samples[int(position)]) or (0, 0) for position in positions]
    sizes = np.array(found, np.int32).reshape(-1, 2)
    with open(file, "wb") as out:
        np.savez(out, data=digest, positions=positions, sizes=sizes)
    return sizes


@dataclass(frozen=True)
class Shaped:
    """Pools of which each has one shape."""

    positions: tuple[Positions, ...]
    shares: tuple[float, ...]
    shapes: tuple[Shape, ...]


def into_buckets(
    pools: Pools, known: Positions, sizes: Sizes, resolution: int, least: int
) -> Shaped:
    """Cut each pool by shape; ``sizes`` are those of the positions ``known``, in order. Shapes that
    fewer than ``least`` of a pool's pictures have go to the nearest that more have."""
    shapes = bucket_shapes(resolution)
    square = nearest((1, 1), shapes)
    own = np.array(
        [nearest((int(h), int(w)), shapes) if h and w else square for h, w in sizes], np.int64
    )
    positions: list[Positions] = []
    shares: list[float] = []
    chosen: list[Shape] = []
    for pool, share in zip(pools.positions, pools.shares, strict=True):
        bucket = own[np.searchsorted(known, pool)]
        counts = np.bincount(bucket, minlength=len(shapes))
        kept = np.flatnonzero(counts >= least)
        if not len(kept):
            kept = np.array([counts.argmax()])
        moved = np.array([kept[nearest(shape, [shapes[k] for k in kept])] for shape in shapes])
        bucket = moved[bucket]
        for number in np.unique(bucket):
            members = pool[bucket == number]
            positions.append(members)
            shares.append(share * len(members) / len(pool))
            chosen.append(shapes[int(number)])
    return Shaped(tuple(positions), tuple(shares), tuple(chosen))
