"""All routes of one batch row as one small picture, for a viewer that lets a person look around.

The file is a PNG of grey levels: region ``i`` is grey ``LEVEL * i``, which any browser gives back
exactly when it draws the picture on a canvas. Pixels, read line by line, are the tokens of the
first block at the first noise level, then of the next block, and so on; the layout tells the sizes.
At four bits a pixel, the 2.56 million tokens of 25 steps x 70 blocks of SDXL at 1024 squared can
never take more than 1.3 MB, however ragged the routes are.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import RoutingError
from ..routing.record import LevelRecord, RoutingRecord
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
    of [block number, height, width], one list per distinct shape), ``blocks`` ({number: label}),
    ``steps`` ([{number, sigma, active, grid}], a noise level each, in the order of the pixels;
    number: of the sampler's step) and ``count``, of the sampler's steps. Where the file would
    exceed ``limit`` bytes, noise levels are left out evenly. RoutingError: nothing recorded, an
    unknown row, or more regions than grey levels.
    """
    record.levels_of(row)  # refuses what has nothing to show
    if record.subjects + 1 > _MAX_REGIONS:
        raise RoutingError(
            f"maps: got {record.subjects} subjects, the viewer shows {_MAX_REGIONS - 1}"
        )
    blocks = record.blocks
    stride = 1
    while True:
        drawn = [_maps(level, blocks, row) for level in record.levels[::stride]]
        tokens = sum(ids.numel() for maps in drawn for ids in maps.values())
        if tokens <= _MAX_PIXELS:
            png = _encode(drawn, tokens)
            if len(png) <= limit or len(drawn) == 1:
                break
        elif len(drawn) == 1:
            raise RoutingError(f"maps: one step has {tokens} tokens, too many for the viewer")
        stride += 1
    grids: list[list[list[int]]] = []
    steps: list[dict[str, Any]] = []
    for level, maps in zip(record.levels[::stride], drawn, strict=True):
        shape = [[index, *ids.shape] for index, ids in maps.items()]
        if shape not in grids:
            grids.append(shape)
        steps.append(
            {
                "number": level.step,
                "sigma": float(f"{level.sigma:.4g}"),
                "active": list(level.active),
                "grid": grids.index(shape),
            }
        )
    colours = (*palette(record.subjects), BACKGROUND_COLOUR)
    layout: dict[str, Any] = {
        "labels": [*record.labels, "background"],
        "colors": ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours],
        "level": LEVEL,
        "grids": grids,
        "blocks": {str(index): record.sites[index - 1].label for index in blocks},
        "steps": steps,
        "count": record.steps,
    }
    return Atlas(png, layout)


def _maps(level: LevelRecord, blocks: Sequence[int], row: int) -> dict[int, Tensor]:
    """Region ids (h,w) of the blocks that were recorded at a noise level."""
    maps = ((index, level.map(index, row)) for index in blocks)
    return {index: ids for index, ids in maps if ids is not None}


def _encode(drawn: Sequence[dict[int, Tensor]], tokens: int) -> bytes:
    """The PNG of the given maps; the last line is filled up with zeros."""
    flat = np.zeros(-(-tokens // WIDTH) * WIDTH, dtype=np.uint8)
    place = 0
    for ids in (ids for maps in drawn for ids in maps.values()):
        flat[place : place + ids.numel()] = ids.flatten().numpy()
        place += ids.numel()
    picture = Image.fromarray(flat.reshape(-1, WIDTH), mode="P")
    levels = [min(255, LEVEL * i) for i in range(16)]
    picture.putpalette([level for level in levels for _ in range(3)])
    file = io.BytesIO()
    picture.save(file, "PNG", bits=4, compress_level=9)
    return file.getvalue()
