"""Which part of a picture is background, where nobody gave a mask.

Background is what has the border's plain colour *and* connects to the border: a white shirt or eye
on white stays. Pictures are (H,W,3) in [0,1].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

PLAIN_SHARE = 0.8  # of a side's pixels that have its colour, where the side is plain
PLAIN_SIDES = 2  # of four, with one colour between them, where the border is plain
_SPREAD = 0.03  # colour distance on a side that still counts as its one colour
_TOLERANCE = 0.06  # colour distance inside the picture that still belongs to the background
_LINE = 0.03  # of a side's length: what is thinner is an outline, and not a part of the subject
_SPECK = 0.001  # of the largest piece of a subject: what is smaller is dust or noise

Mask = NDArray[np.bool_]


def cut_background(rgb: Tensor) -> Tensor | None:
    """The subject (H,W) in {0,1} in front of a plain background; None where the border is not
    plain, or nothing else is there."""
    picture = rgb.numpy()
    sides = {
        "top": picture[0],
        "bottom": picture[-1],
        "left": picture[:, 0],
        "right": picture[:, -1],
    }
    colours = _plain_colours(sides)
    if len(colours) < PLAIN_SIDES:
        return None
    distance = _distance(picture, np.median(np.stack(list(colours.values())), axis=0))
    labels, _ = ndimage.label(distance <= _TOLERANCE)
    edges = {"top": labels[0], "bottom": labels[-1], "left": labels[:, 0], "right": labels[:, -1]}
    outside = {int(edges[name][start]) for name in colours for start in _open_runs(edges[name] > 0)}
    subject = _without_specks(_sharp(~np.isin(labels, list(outside)), distance))
    return torch.as_tensor(subject, dtype=torch.float32) if subject.any() else None


def _distance(pixels: NDArray[np.float32], colour: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of pixels (...,3) from a colour, in the channel where it is largest."""
    return np.abs(pixels - colour).max(axis=-1)


def _plain_colours(
    sides: dict[str, NDArray[np.float32]],
) -> dict[str, NDArray[np.float32]]:
    """Of sides (n,3) the largest group of plain ones with one colour: name -> colour (3,)."""
    plain: dict[str, NDArray[np.float32]] = {}
    for name, pixels in sides.items():
        colour = np.median(pixels, axis=0)
        if (_distance(pixels, colour) <= _SPREAD).mean() >= PLAIN_SHARE:
            plain[name] = colour
    groups = [
        {name: other for name, other in plain.items() if _distance(other, colour) <= _TOLERANCE}
        for colour in plain.values()
    ]
    return max(groups, key=len, default=dict[str, NDArray[np.float32]]())


def _open_runs(alike: Mask) -> Iterator[int]:
    """First pixels of the runs of background along a side (n,) bool. A run between two outlines is
    a part of the subject that the edge cuts, such as a shirt; between two thick things it is a gap,
    such as the one between legs."""
    step = np.flatnonzero(np.diff(np.concatenate(([False], alike, [False]))))
    starts, ends = step[::2], step[1::2]
    line = max(2, _LINE * len(alike))
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        before = start - ends[i - 1] if i else np.inf
        after = starts[i + 1] - end if i + 1 < len(starts) else np.inf
        if start == 0 or end == len(alike) or (before > line and after > line):
            yield int(start)


def _sharp(subject: Mask, distance: NDArray[np.float32]) -> Mask:
    """Without pixels of the outline that are more background than subject: an outline is drawn as a
    mixture of both, and JPEG smears it."""
    outline = subject & ndimage.binary_dilation(~subject)
    return subject & ~(outline & (distance < 0.5 * ndimage.maximum_filter(distance, size=3)))


def _without_specks(subject: Mask) -> Mask:
    """Without pieces that are tiny beside the largest: a crop goes around all that is left."""
    labels, _ = ndimage.label(subject, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept = sizes >= _SPECK * sizes.max()
    kept[0] = False
    return kept[labels]
