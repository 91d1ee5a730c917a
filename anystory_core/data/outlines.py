"""Masks as annotations have them: polygons and run lengths -> bool, by pycocotools.

Its C code trusts what it is given, so everything is checked here first. A polygon is drawn in the
box that holds it: most instances are a small part of their picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .libraries import library

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Outline:
    """The ``mask`` (h,w) of an instance at (``top``, ``left``) of its picture, empty around it."""

    mask: Mask
    top: int = 0
    left: int = 0

    @property
    def area(self) -> int:
        """In pixels."""
        return int(np.count_nonzero(self.mask))

    def paint(self, labels: NDArray[Any], number: int) -> None:
        """Write ``number`` where the instance is in (H,W) ``labels``."""
        height, width = self.mask.shape
        box = labels[self.top : self.top + height, self.left : self.left + width]
        np.copyto(box, number, where=self.mask)


def outline_of(segmentation: Any, size: tuple[int, int]) -> Outline:
    """A COCO ``segmentation`` for a picture of (height, width): polygons [[x0,y0,x1,...],...], or a
    table of ``size`` and ``counts``, a list of run lengths or their compressed text. DataError."""
    if isinstance(segmentation, Mapping):
        return Outline(_of_runs(cast("Mapping[str, Any]", segmentation), size))
    if isinstance(segmentation, list):
        return _of_polygons(cast("list[Any]", segmentation), size)
    raise DataError(f"a segmentation is {segmentation!r:.60}, expected polygons or run lengths")


def mask_of(segmentation: Any, size: tuple[int, int]) -> Mask:
    """As :func:`outline_of`, of the whole picture: (H,W)."""
    mask = np.zeros(size, np.bool_)
    outline_of(segmentation, size).paint(mask, True)
    return mask


def _of_polygons(polygons: Sequence[Any], size: tuple[int, int]) -> Outline:
    height, width = size
    whole: list[NDArray[np.float64]] = []
    for polygon in polygons:
        try:
            points = np.asarray(polygon, np.float64).reshape(-1, 2)
        except (TypeError, ValueError) as error:
            raise DataError(f"a polygon is no list of x and y ({error})") from error
        if len(points) < 3:
            continue  # a line has no area; COCO has some
        if not np.isfinite(points).all() or (np.abs(points) > 2 * max(size)).any():
            raise DataError(f"a polygon leaves the picture of {width}x{height} by far")
        # To the fifths of a pixel that pycocotools rounds to: moved to the box they stay what they
        # are, while a coordinate between two of them could go to the other one.
        whole.append(np.floor(5 * points.clip((0, 0), (width, height)) + 0.5) / 5)
    if not whole:
        raise DataError("a segmentation without a polygon of three points")
    points = np.concatenate(whole)
    # A pixel more on each side, so that the box cuts nothing that the picture would not.
    left, top = (max(0, int(low) - 1) for low in points.min(axis=0))
    right, bottom = (
        min(side, int(high) + 2)
        for side, high in zip((width, height), points.max(axis=0), strict=True)
    )
    coco = library("pycocotools.mask", "pycocotools")
    moved = [(polygon - (left, top)).ravel().tolist() for polygon in whole]
    outlines = coco.frPyObjects(moved, bottom - top, right - left)
    mask = coco.decode(outlines[0] if len(outlines) == 1 else coco.merge(outlines))
    return Outline(mask.view(np.bool_), top, left)


def _of_runs(table: Mapping[str, Any], size: tuple[int, int]) -> Mask:
    counts = table.get("counts")
    if list(table.get("size") or size) != list(size):
        raise DataError(f"run lengths for a picture of {table.get('size')}, this one is {size}")
    runs = _decompress(counts) if isinstance(counts, (str, bytes)) else counts
    try:
        lengths = np.asarray(runs, np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"run lengths are no whole numbers ({error})") from error
    pixels = size[0] * size[1]
    if lengths.ndim != 1 or (lengths < 0).any() or (lengths > pixels).any():
        raise DataError("run lengths are no list of numbers within the picture")
    if lengths.sum() != pixels:
        raise DataError(f"run lengths cover {lengths.sum()} pixels of {pixels}")
    values = np.arange(len(lengths)) % 2 == 1  # they begin with zeros and run down the columns
    return np.repeat(values, lengths).reshape(size[::-1]).T


def _decompress(text: str | bytes) -> list[int]:
    """COCO's compressed run lengths: numbers of 5 bits a letter, the low ones first, each letter's
    sixth bit saying that more follow; from the third number on, as differences to the last but
    one."""
    letters = text.encode("latin-1", "replace") if isinstance(text, str) else text
    counts: list[int] = []
    number = shift = 0
    for letter in letters:
        bits = letter - 48
        if not 0 <= bits < 64:
            raise DataError("compressed run lengths have letters that do not belong there")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    if shift:
        raise DataError("compressed run lengths end in the middle of a number")
    return counts
