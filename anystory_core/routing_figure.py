"""Pictures of recorded routes, as in the paper's Fig. 5: a row per subject, a column per step.

Each cell shows all L blocks in forward order, top to bottom and left to right; yellow is the
subject's region, dark the rest. A cell is blank where the subject was outside its window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .routing_maps import RoutingRecord

_INK = (32, 32, 32)
_PAPER = (255, 255, 255)
_BLANK = (225, 225, 225)
_GAP = 2  # pixels between tiles
_PAD = 12  # pixels between cells
_HEADER = 28
_LABEL_WIDTH = 150
OVERLAY_OPACITY = 0.45


@lru_cache
def _palette(name: str, size: int) -> Tensor:
    """(size,3) uint8 of a perceptually uniform colour map. Imported late: it is slow to import."""
    from kornia.color import ColorMap  # pyright: ignore[reportMissingTypeStubs]

    colours = cast(Any, ColorMap)(base=name, num_colors=size).colors  # (3,size) in [0,1]
    return (cast(Tensor, colours).T * 255).round().to(torch.uint8)


def subject_colours(subjects: int) -> Tensor:
    """(subjects,3) uint8, far apart on a colour map that colour-blind people can read."""
    palette = _palette("viridis", 256)
    places = torch.linspace(255, 40, max(subjects, 1)).long()
    return palette[places]


def figure(
    record: RoutingRecord,
    *,
    row: int = 0,
    steps: Sequence[int],
    background: bool = False,
) -> Tensor:
    """(H,W,3) float in [0,1]. ``steps`` are numbers of recorded sampler steps; ``row`` is the batch
    row; ``background`` adds its row, which is the complement of the subjects'."""
    blocks = [site.index for site in record.sites]
    columns = math.ceil(math.sqrt(len(blocks) * 1.4))
    lines = math.ceil(len(blocks) / columns)
    tile_w, tile_h = _tile_size(record, 24 if len(blocks) > 30 else 44)
    cell_w = columns * (tile_w + _GAP) - _GAP
    cell_h = lines * (tile_h + _GAP) - _GAP
    candidates = range(record.subjects + int(background))
    shares = record.shares(row)

    width = _LABEL_WIDTH + len(steps) * (cell_w + _PAD)
    height = _HEADER + len(candidates) * (cell_h + _PAD)
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    for place, step in enumerate(steps):
        x = _LABEL_WIDTH + place * (cell_w + _PAD)
        sigma = record.steps[step].sigma
        draw.text((x, 6), f"step {step + 1}  (sigma {sigma:.2f})", _INK, font)
    for line, candidate in enumerate(candidates):
        y = _HEADER + line * (cell_h + _PAD)
        name = record.labels[candidate] if candidate < record.subjects else "background"
        draw.multiline_text((6, y + 4), _wrap(name, font, shares[candidate]), _INK, font)
        for place, step in enumerate(steps):
            x = _LABEL_WIDTH + place * (cell_w + _PAD)
            for number, index in enumerate(blocks):
                left = x + (number % columns) * (tile_w + _GAP)
                top = y + (number // columns) * (tile_h + _GAP)
                tile = _tile(record, step, index, row, candidate, (tile_w, tile_h))
                canvas.paste(tile, (left, top))
    return _tensor(canvas)


def overlay(record: RoutingRecord, picture: Tensor, *, row: int = 0) -> Tensor:
    """The consensus routes over a decoded picture (H,W,3) in [0,1], with each subject's share."""
    height, width = picture.shape[:2]
    masks = record.masks(row, (height, width))
    colours = subject_colours(record.subjects).float() / 255
    out = picture.clone()
    for mask, colour in zip(masks, colours, strict=True):
        alpha = mask[..., None] * OVERLAY_OPACITY
        out = out * (1 - alpha) + colour * alpha
    canvas = Image.fromarray(cast(Any, (out.clamp(0, 1) * 255).round().to(torch.uint8)).numpy())
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(11, height // 40))
    y = 4.0
    for label, colour, share in zip(record.labels, colours, record.shares(row), strict=False):
        text = f"{label}: {100 * share:.0f} %"
        box = draw.textbbox((6, y), text, font)
        draw.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), _PAPER)
        fill = tuple(int(255 * float(c) * 0.7) for c in colour)
        draw.text((6, y), text, fill, font)
        y = box[3] + 4
    return _tensor(canvas)


def _tile_size(record: RoutingRecord, longest: int) -> tuple[int, int]:
    """(width, height) of one block's map, in the picture's proportions."""
    grids = [grid for step in record.steps for grid in step.grids.values()]
    height, width = max(grids, key=lambda g: g[0] * g[1], default=(1, 1))
    scale = longest / max(height, width)
    return max(6, round(width * scale)), max(6, round(height * scale))


def _tile(
    record: RoutingRecord,
    step: int,
    index: int,
    row: int,
    candidate: int,
    size: tuple[int, int],
) -> Image.Image:
    ids = record.block_map(step, index, row)
    active = candidate >= record.subjects or record.steps[step].active[candidate]
    if ids is None or not active:
        return Image.new("RGB", size, _BLANK)
    dark, bright = _palette("viridis", 256)[[30, 250]]
    inside = (ids == candidate)[..., None]
    pixels = torch.where(inside, bright, dark)
    return Image.fromarray(cast(Any, pixels).numpy()).resize(size, Image.Resampling.NEAREST)


def _wrap(name: str, font: Any, share: float) -> str:
    """The label cut to the column's width, and the share of the picture below it."""
    text = name
    while text and font.getlength(text) > _LABEL_WIDTH - 14:
        text = text[:-1]
    if text != name:
        text = text[:-1] + "…"
    return f"{text}\n{100 * share:.1f} % of the picture"


def _tensor(image: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.reshape(image.height, image.width, 3).float() / 255
