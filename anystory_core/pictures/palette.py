"""Colours and shares in the pictures of routes."""

from __future__ import annotations

import functools
import importlib
from typing import Any

Colour = tuple[int, int, int]

# (kornia colour map, position among 64). Chosen by farthest-point search over these maps for the
# largest least distance in Lab as seen with normal sight, protanopia, deuteranopia and tritanopia.
_COLOURS = (
    ("plasma", 63),  # yellow, as in the paper
    ("turbo", 7),  # blue
    ("turbo", 23),  # green
    ("turbo", 55),  # red
    ("plasma", 28),  # magenta
    ("plasma", 49),  # orange
    ("turbo", 14),  # sky
    ("plasma", 41),  # rose
)
BACKGROUND_COLOUR: Colour = (150, 150, 150)


@functools.cache
def palette(subjects: int) -> tuple[Colour, ...]:
    """One RGB colour per subject, in 0..255, told apart by colour-blind people as well; the ninth
    subject begins again."""
    color: Any = importlib.import_module("kornia.color")
    maps = {name: color.ColorMap(name, num_colors=64).colors for name in dict(_COLOURS)}
    chosen: list[Colour] = []
    for i in range(subjects):
        name, place = _COLOURS[i % len(_COLOURS)]
        red, green, blue = (round(255 * float(c)) for c in maps[name][:, place])
        chosen.append((red, green, blue))
    return tuple(chosen)


def share_text(share: float) -> str:
    """``0.234`` -> ``23 %``; small shares keep a digit, so that 0.4 % is not shown as 0."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.1f} %"
