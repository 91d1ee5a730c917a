"""Named places, drawn from a seed: each call gives another light, horizon and furniture.

A place is a function ``(draw, rng, size)`` over a canvas that already holds its sky-to-ground
gradient. Drawn at half size and enlarged, which is fast and softens the edges.
"""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

RGB = tuple[int, int, int]
Painter = Callable[[Any, random.Random, int], None]


def _vary(colour: RGB, rng: random.Random, amount: float = 0.08) -> RGB:
    """A neighbouring colour."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    h = (h + rng.uniform(-amount, amount) / 3) % 1
    s = min(1.0, max(0.0, s + rng.uniform(-amount, amount)))
    v = min(1.0, max(0.0, v + rng.uniform(-amount, amount)))
    r, g, b = colorsys.hsv_to_rgb(h, s, v)
    return round(255 * r), round(255 * g), round(255 * b)


def _hills(draw: Any, rng: random.Random, size: int, base: float, height: float, c: RGB) -> None:
    phase, waves = rng.uniform(0, 6), rng.uniform(1.2, 3)
    points = [
        (x, size * (base - height * (0.5 + 0.5 * math.sin(phase + waves * 6.28 * x / size))))
        for x in range(0, size + 8, 8)
    ]
    draw.polygon([*points, (size, size), (0, size)], fill=_vary(c, rng))


def _sun(draw: Any, rng: random.Random, size: int, colour: RGB) -> None:
    r = size * rng.uniform(0.05, 0.1)
    x, y = size * rng.uniform(0.1, 0.9), size * rng.uniform(0.1, 0.3)
    draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _beach(draw: Any, rng: random.Random, size: int) -> None:
    _sun(draw, rng, size, (255, 240, 170))
    top = size * rng.uniform(0.4, 0.5)
    draw.rectangle((0, top, size, size), fill=_vary((40, 140, 200), rng))
    _hills(draw, rng, size, 0.75, 0.1, (235, 205, 140))


def _forest(draw: Any, rng: random.Random, size: int) -> None:
    for _ in range(14):
        x, w = rng.uniform(0, size), size * rng.uniform(0.05, 0.12)
        y = size * rng.uniform(0.55, 0.75)
        draw.rectangle((x - w / 8, y, x + w / 8, y + size * 0.12), fill=(85, 55, 35))
        green = _vary((30, 95, 45), rng, 0.12)
        draw.polygon([(x - w, y), (x + w, y), (x, y - size * rng.uniform(0.3, 0.5))], fill=green)
    draw.rectangle((0, size * 0.8, size, size), fill=_vary((60, 85, 40), rng))


def _night_city(draw: Any, rng: random.Random, size: int) -> None:
    x = 0.0
    while x < size:
        w, top = size * rng.uniform(0.08, 0.16), size * rng.uniform(0.25, 0.6)
        draw.rectangle((x, top, x + w, size * 0.85), fill=_vary((35, 38, 60), rng, 0.05))
        for row in range(int(top) + 4, int(size * 0.82), 7):
            for column in range(int(x) + 3, int(x + w) - 3, 6):
                if rng.random() < 0.5:
                    draw.rectangle((column, row, column + 2, row + 3), fill=(255, 220, 120))
        x += w + 1
    draw.rectangle((0, size * 0.85, size, size), fill=(25, 25, 35))


def _snow(draw: Any, rng: random.Random, size: int) -> None:
    _hills(draw, rng, size, 0.7, 0.2, (215, 228, 240))
    _hills(draw, rng, size, 0.85, 0.1, (240, 246, 252))
    for _ in range(60):
        x, y, r = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(0.6, 1.8)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255))


def _desert(draw: Any, rng: random.Random, size: int) -> None:
    _sun(draw, rng, size, (255, 250, 210))
    _hills(draw, rng, size, 0.65, 0.15, (205, 150, 85))
    _hills(draw, rng, size, 0.8, 0.12, (225, 175, 105))


def _meadow(draw: Any, rng: random.Random, size: int) -> None:
    _hills(draw, rng, size, 0.6, 0.1, (120, 180, 80))
    _hills(draw, rng, size, 0.75, 0.06, (95, 165, 65))
    for _ in range(45):
        x, y = rng.uniform(0, size), size * rng.uniform(0.7, 1)
        colour = rng.choice([(250, 220, 80), (240, 120, 150), (250, 250, 250)])
        draw.ellipse((x - 1.6, y - 1.6, x + 1.6, y + 1.6), fill=colour)


def _sea(draw: Any, rng: random.Random, size: int) -> None:
    top = size * rng.uniform(0.3, 0.4)
    draw.rectangle((0, top, size, size), fill=_vary((20, 95, 150), rng))
    for _ in range(40):
        x, y = rng.uniform(0, size), rng.uniform(top + 3, size)
        w = size * 0.03 + (y - top) * 0.1
        draw.line((x, y, x + w, y), fill=_vary((110, 180, 215), rng), width=1)


def _room(draw: Any, rng: random.Random, size: int) -> None:
    floor = size * rng.uniform(0.68, 0.78)
    draw.rectangle((0, floor, size, size), fill=_vary((150, 100, 60), rng))
    for x in range(0, size, 18):
        draw.line((x, floor, x - (x - size / 2) * -0.3, size), fill=(120, 78, 45), width=1)
    x, w = size * rng.uniform(0.1, 0.6), size * rng.uniform(0.2, 0.3)
    draw.rectangle((x, size * 0.15, x + w, size * 0.45), fill=(175, 215, 240), outline=(250,) * 3)
    draw.line((x + w / 2, size * 0.15, x + w / 2, size * 0.45), fill=(250, 250, 250), width=2)


def _mountains(draw: Any, rng: random.Random, size: int) -> None:
    for layer in range(2):
        for _ in range(4):
            x, w = rng.uniform(0, size), size * rng.uniform(0.25, 0.4)
            peak = size * rng.uniform(0.15, 0.35) + layer * size * 0.15
            base = size * 0.8
            rock = _vary((105 - 25 * layer, 110 - 20 * layer, 130 - 30 * layer), rng, 0.04)
            draw.polygon([(x - w, base), (x + w, base), (x, peak)], fill=rock)
            tip = (base - peak) * 0.2
            side = w * 0.2
            draw.polygon([(x - side, peak + tip), (x + side, peak + tip), (x, peak)], fill="white")
    draw.rectangle((0, size * 0.8, size, size), fill=_vary((80, 110, 70), rng))


def _space(draw: Any, rng: random.Random, size: int) -> None:
    for _ in range(90):
        x, y, r = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(0.4, 1.3)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(235, 235, 255))
    r = size * rng.uniform(0.08, 0.2)
    x, y = rng.uniform(0, size), rng.uniform(0, size * 0.5)
    planet = _vary((170, 120, 90), rng, 0.2)
    draw.ellipse((x - r, y - r, x + r, y + r), fill=planet)


def _sunset(draw: Any, rng: random.Random, size: int) -> None:
    r, x = size * rng.uniform(0.1, 0.16), size * rng.uniform(0.2, 0.8)
    y = size * 0.6
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 225, 120))
    _hills(draw, rng, size, 0.72, 0.1, (70, 35, 60))
    _hills(draw, rng, size, 0.85, 0.06, (40, 22, 42))


def _underwater(draw: Any, rng: random.Random, size: int) -> None:
    for _ in range(26):
        x, y, r = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(1, 4)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=(180, 230, 240))
    for _ in range(9):
        x, h = rng.uniform(0, size), size * rng.uniform(0.1, 0.3)
        draw.line((x, size, x + rng.uniform(-8, 8), size - h), fill=(40, 140, 90), width=4)
    _hills(draw, rng, size, 0.95, 0.06, (200, 180, 120))


def _autumn_park(draw: Any, rng: random.Random, size: int) -> None:
    for _ in range(9):
        x, y, r = rng.uniform(0, size), size * rng.uniform(0.3, 0.5), size * rng.uniform(0.1, 0.17)
        draw.rectangle((x - 3, y, x + 3, size * 0.75), fill=(90, 60, 45))
        leaf = rng.choice([(215, 110, 30), (190, 60, 30), (230, 165, 45)])
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_vary(leaf, rng))
    draw.rectangle((0, size * 0.75, size, size), fill=_vary((170, 125, 60), rng))


def _kitchen(draw: Any, rng: random.Random, size: int) -> None:
    step = size // rng.randint(8, 12)
    for x in range(0, size, step):
        draw.line((x, 0, x, size * 0.65), fill=(205, 210, 215), width=1)
    for y in range(0, int(size * 0.65), step):
        draw.line((0, y, size, y), fill=(205, 210, 215), width=1)
    draw.rectangle((0, size * 0.65, size, size * 0.72), fill=_vary((120, 85, 60), rng))
    draw.rectangle((0, size * 0.72, size, size), fill=_vary((80, 120, 130), rng, 0.2))


# name: (top colour, bottom colour, painter)
PLACES: dict[str, tuple[RGB, RGB, Painter]] = {
    "beach": ((120, 190, 240), (200, 230, 250), _beach),
    "forest": ((170, 205, 190), (90, 130, 80), _forest),
    "night city": ((15, 15, 45), (60, 45, 90), _night_city),
    "snowy field": ((170, 195, 220), (225, 235, 245), _snow),
    "desert": ((110, 170, 225), (245, 225, 180), _desert),
    "meadow": ((125, 185, 240), (205, 230, 245), _meadow),
    "sea": ((150, 200, 235), (215, 235, 245), _sea),
    "room": ((225, 205, 180), (205, 185, 160), _room),
    "mountains": ((140, 190, 235), (220, 232, 242), _mountains),
    "space": ((8, 8, 24), (28, 16, 52), _space),
    "sunset": ((90, 50, 110), (250, 140, 70), _sunset),
    "underwater world": ((30, 130, 170), (10, 50, 100), _underwater),
    "autumn park": ((190, 205, 215), (225, 205, 170), _autumn_park),
    "kitchen": ((232, 234, 236), (222, 225, 228), _kitchen),
}


def draw_place(name: str, rng: random.Random, size: int) -> Image.Image:
    """RGB picture of a named place, ``size`` squared."""
    top, bottom, paint = PLACES[name]
    half = size // 2
    top, bottom = _vary(top, rng), _vary(bottom, rng)
    gradient = Image.linear_gradient("L").resize((half, half))
    canvas = Image.composite(
        Image.new("RGB", (half, half), bottom), Image.new("RGB", (half, half), top), gradient
    )
    paint(ImageDraw.Draw(canvas), rng, half)
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))
    if rng.random() < 0.5:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return canvas.resize((size, size), Image.Resampling.BICUBIC)
