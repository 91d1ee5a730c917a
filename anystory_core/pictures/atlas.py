"""All routes of one batch row as one small picture, for a viewer that lets a person look around.

The file is a PNG of grey levels: region ``i`` is grey ``LEVEL * i``, which any browser gives back
exactly when it draws the picture on a canvas. Pixels, read line by line, are the tokens of the
first block of the first step, then of the next block, and so on; the layout tells the sizes.
At four bits a pixel, the 2.56 million tokens of 25 steps x 70 blocks of SDXL at 1024 squared can
never take more than 1.3 MB, however ragged the routes are.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..errors import RoutingError
from ..routing.record import RoutingRecord, StepRecord
from .palette import BACKGROUND_COLOUR, palette

LEVEL = (
    28  # grey distance of neighbouring ids: 9 regions fit, and one grey level of noise is harmless
)
WIDTH = 1024
LIMIT = 2 * 2**20  # bytes
_MAX_PIXELS = 2**24  # what every browser's canvas can hold
_MAX_REGIONS = 255 // LEVEL + 1


@dataclass(frozen=True)
class Atlas:
    """``png``: the file. ``layout``: JSON-ready description, see :func:`build_atlas`."""

    png: bytes
    layout: dict[str, Any]


def build_atlas(record: RoutingRecord, row: int, *, limit: int = LIMIT) -> Atlas:
    """Pack the routes of batch row ``row``.

    layout: ``labels``, ``colors`` ("#rrggbb", the background's last), ``level``, ``grids`` (lists
    of [block number, height, width], one list per distinct shape of a step), ``blocks`` ({number:
    label}), ``steps`` ([{number, sigma, active, grid}], in the order of the pixels). Where the file
    would exceed ``limit`` bytes, steps are left out evenly; ``recorded`` tells how many there were.
    RoutingError: nothing recorded, unknown row, or more regions than grey levels.
    """
    if not record.blocks:
        raise RoutingError(
            "maps: no routes were recorded; the subjects may have been inactive (strength 0, or "
            "outside start and end)"
        )
    if record.subjects + 1 > _MAX_REGIONS:
        raise RoutingError(
            f"maps: got {record.subjects} subjects, the viewer shows {_MAX_REGIONS - 1}"
        )
    record.block_map(0, record.blocks[0], row)  # checks the row
    stride = 1
    while True:
        kept = range(0, len(record.steps), stride)
        tokens = sum(_tokens(record.steps[step]) for step in kept)
        if tokens <= _MAX_PIXELS:
            png = _encode(record, row, kept, tokens)
            if len(png) <= limit or len(kept) == 1:
                break
        elif len(kept) == 1:
            raise RoutingError(f"maps: one step has {tokens} tokens, too many for the viewer")
        stride += 1
    grids: list[list[list[int]]] = []
    steps: list[dict[str, Any]] = []
    for number in kept:
        step = record.steps[number]
        shape = [[index, *step.grids[index]] for index in sorted(step.ids)]
        if shape not in grids:
            grids.append(shape)
        steps.append(
            {
                "number": number,
                "sigma": float(f"{step.sigma:.4g}"),
                "active": list(step.active),
                "grid": grids.index(shape),
            }
        )
    colours = (*palette(record.subjects), BACKGROUND_COLOUR)
    layout: dict[str, Any] = {
        "labels": [*record.labels, "background"],
        "colors": ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours],
        "level": LEVEL,
        "grids": grids,
        "blocks": {str(index): record.sites[index - 1].label for index in record.blocks},
        "steps": steps,
        "recorded": len(record.steps),
    }
    return Atlas(png, layout)


def _tokens(step: StepRecord) -> int:
    return sum(height * width for height, width in step.grids.values())


def _encode(record: RoutingRecord, row: int, steps: range, tokens: int) -> bytes:
    """The PNG of the given steps; the last line is filled up with zeros."""
    flat = np.zeros(-(-tokens // WIDTH) * WIDTH, dtype=np.uint8)
    place = 0
    for number in steps:
        for index in sorted(record.steps[number].ids):
            ids = record.block_map(number, index, row)
            if ids is not None:
                flat[place : place + ids.numel()] = ids.flatten().numpy()
                place += ids.numel()
    picture = Image.fromarray(flat.reshape(-1, WIDTH), mode="P")
    levels = [min(255, LEVEL * i) for i in range(16)]
    picture.putpalette([level for level in levels for _ in range(3)])
    file = io.BytesIO()
    picture.save(file, "PNG", bits=4, compress_level=9)
    return file.getvalue()
