"""Pictures of a :class:`~..routing.record.RoutingRecord`: the grid of Fig. 5 and the overlay.

Fig. 5 as the paper prints it: a row per subject, a column per noise level, and in each cell one
tile per transformer block in forward order. Here each tile is named, each subject has a colour of
its own, and each row tells the subject's share of the picture.

Pictures are (H,W,3) float in [0,1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..routing.record import LevelRecord, RoutingRecord
from . import lettering
from .palette import BACKGROUND_COLOUR, Colour, palette, share_text

MOST_PIXELS = 2**23  # of a figure: 100 MB in float32; 9 noise levels of SDXL with 4 subjects

_PAGE: Colour = (24, 24, 28)
_EMPTY: Colour = (46, 46, 54)
_BORDER: Colour = (84, 84, 94)
_TEXT: Colour = (225, 225, 230)
_DIM: Colour = (150, 150, 160)
_MARGIN = 8
_LABEL_WIDTH = 132
_HEADER, _SPACE = 20, 14


@dataclass(frozen=True)
class _Layout:
    """Sizes of one cell of the figure, in pixels."""

    columns: int
    rows: int
    tile: tuple[int, int]  # height, width

    caption = 12
    gap = 5

    @property
    def height(self) -> int:
        return self.rows * (self.tile[0] + self.gap + self.caption)

    @property
    def width(self) -> int:
        return self.columns * (self.tile[1] + self.gap)

    def place(self, number: int) -> tuple[int, int]:
        """Top left corner of tile ``number`` inside the cell: (x, y)."""
        row, column = divmod(number, self.columns)
        return column * (self.tile[1] + self.gap), row * (self.tile[0] + self.gap + self.caption)


def _layout(levels: Sequence[LevelRecord], blocks: int, tile: int) -> _Layout:
    height, width = max(
        (grid for level in levels for grid in level.grids.values()), key=lambda g: g[0] * g[1]
    )
    longest = max(height, width)
    size = max(8, round(tile * height / longest)), max(8, round(tile * width / longest))
    # A cell somewhat wider than high, with as few free places in its last line as possible.
    ideal = math.sqrt(blocks * size[0] / size[1])
    choices = range(max(1, math.floor(1.1 * ideal)), max(1, math.ceil(1.5 * ideal)) + 1)
    columns = min(min(choices, key=lambda c: -blocks % c), blocks)
    return _Layout(columns, math.ceil(blocks / columns), size)


def figure(
    record: RoutingRecord,
    *,
    row: int = 0,
    levels: Sequence[LevelRecord],
    background: bool = False,
    tile: int = 44,
) -> Tensor:
    """The grid of Fig. 5 for one batch row: (H,W,3), of at most MOST_PIXELS.

    ``levels``: noise levels of the record, a column each; where they do not all fit, those of
    :func:`fitting` are drawn. A cell stays blank where its subject was outside its window.
    ``background`` adds a row for region N+1. ``tile``: longest side of a tile in pixels.
    RoutingError: nothing recorded, or an unknown row.
    """
    layout = _layout(record.levels_of(row), len(record.blocks), tile)
    levels = fitting(record, row=row, levels=levels, background=background, tile=tile)
    shares = record.shares(row)
    colours = (*palette(record.subjects), BACKGROUND_COLOUR)
    names = [lettering.short_label(label, i + 1) for i, label in enumerate(record.labels)]
    names.append("background")
    regions = range(record.subjects + (1 if background else 0))

    page = Image.new("RGB", _size(layout, len(levels), len(regions)), _PAGE)
    draw = ImageDraw.Draw(page)
    for column, level in enumerate(levels):
        x = _LABEL_WIDTH + column * (layout.width + _SPACE)
        text = f"step {level.step + 1} of {record.steps}   sigma {level.sigma:.3g}"
        draw.text((x, 4), text, fill=_TEXT, font=_font(11))
    for place, region in enumerate(regions):
        y = _HEADER + place * (layout.height + _SPACE)
        draw.rectangle((_MARGIN, y, _MARGIN + 10, y + 10), fill=colours[region])
        lettering.draw(page, (_MARGIN + 16, y - 2), names[region], 12, _TEXT)
        text = f"{share_text(shares[region])} of the picture"
        draw.text((_MARGIN, y + 16), text, fill=_DIM, font=_font(11))
        for column, level in enumerate(levels):
            x = _LABEL_WIDTH + column * (layout.width + _SPACE)
            _cell(page, (x, y), layout, record, row, level, region, colours[region])
    return _to_tensor(page)


def fitting(
    record: RoutingRecord,
    *,
    row: int = 0,
    levels: Sequence[LevelRecord],
    background: bool = False,
    tile: int = 44,
) -> list[LevelRecord]:
    """Those of ``levels`` that :func:`figure` draws: all, or as many as MOST_PIXELS hold, evenly
    from the first to the last."""
    layout = _layout(record.levels_of(row), len(record.blocks), tile)
    regions = record.subjects + (1 if background else 0)
    most = len(levels)
    while most > 1 and math.prod(_size(layout, most, regions)) > MOST_PIXELS:
        most -= 1
    return [levels[round(i * (len(levels) - 1) / max(1, most - 1))] for i in range(most)]


def _size(layout: _Layout, columns: int, rows: int) -> tuple[int, int]:
    """Width and height of a figure."""
    width = _LABEL_WIDTH + columns * (layout.width + _SPACE) + _MARGIN
    return width, _HEADER + rows * (layout.height + _SPACE) + _MARGIN


def _cell(
    page: Image.Image,
    corner: tuple[int, int],
    layout: _Layout,
    record: RoutingRecord,
    row: int,
    level: LevelRecord,
    region: int,
    colour: Colour,
) -> None:
    """All blocks of one region at one noise level."""
    draw = ImageDraw.Draw(page)
    active = (*level.active, True)[region]
    height, width = layout.tile
    for number, index in enumerate(record.blocks):
        site = record.sites[index - 1]
        x, y = layout.place(number)
        x, y = corner[0] + x, corner[1] + y
        ids = level.map(index, row) if active else None
        if ids is not None:
            inside = (ids == region).numpy()[..., None]
            pixels = np.where(inside, np.array(colour, np.uint8), np.array(_EMPTY, np.uint8))
            tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            page.paste(tile, (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_BORDER)
        draw.text((x, y + height), site.short_label, fill=_DIM, font=_font(9))


def overlay(
    record: RoutingRecord,
    picture: Tensor,
    *,
    row: int = 0,
    opacity: float = 0.45,
) -> Tensor:
    """The consensus routes over the decoded picture (H,W,3 in [0,1]): tinted regions with
    outlines, and a legend with every subject's share below: (H',W,3), H' > H."""
    height, width = int(picture.shape[0]), int(picture.shape[1])
    masks = record.masks(row, (height, width))  # (N,H,W)
    colours = palette(record.subjects)
    out = picture[..., :3].float().clamp(0, 1).cpu().clone()
    line = max(1, round(max(height, width) / 400))
    for mask, colour in zip(masks, colours, strict=True):
        tint = torch.tensor(colour, dtype=torch.float32) / 255
        inside = mask.bool()
        out[inside] = (1 - opacity) * out[inside] + opacity * tint
        eroded = -torch.nn.functional.max_pool2d(-mask[None, None], 2 * line + 1, 1, line)[0, 0]
        out[inside & (eroded < 0.5)] = tint
    legend = _legend(record.labels, record.shares(row), colours, width)
    return torch.cat((out, legend))


def _legend(
    labels: Sequence[str], shares: Sequence[float], colours: Sequence[Colour], width: int
) -> Tensor:
    """Swatch, label and share of each subject, as many to a line as fit: (h,width,3)."""
    names = [lettering.short_label(label, i + 1) for i, label in enumerate(labels)]
    places: list[tuple[int, int, int]] = []  # of swatch, line, and share
    x, y = _MARGIN, 5
    for name, share in zip(names, shares, strict=False):
        # Apart, or a name from right to left would turn the share with it.
        beside = 18 + lettering.width(name, 12) + 7
        needed = beside + lettering.width(share_text(share), 12) + 14
        if x > _MARGIN and x + needed > width:
            x, y = _MARGIN, y + 18
        places.append((x, y, x + beside))
        x += needed
    page = Image.new("RGB", (width, y + 20), _PAGE)
    draw = ImageDraw.Draw(page)
    for (x, y, beside), name, share, colour in zip(places, names, shares, colours, strict=False):
        draw.rectangle((x, y + 1, x + 11, y + 12), fill=colour)
        lettering.draw(page, (x + 18, y), name, 12, _TEXT)
        lettering.draw(page, (beside, y), share_text(share), 12, _TEXT)
    return _to_tensor(page)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _to_tensor(page: Image.Image) -> Tensor:
    """(H,W,3) float in [0,1]."""
    data = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8)
    return data.reshape(page.height, page.width, 3).float() / 255
