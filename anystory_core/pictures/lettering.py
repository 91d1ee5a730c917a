"""Labels in the pictures of routes, in any script that a font of this machine has.

Pillow's own font has little more than Latin letters. For others the fonts of the system are looked
through, once for each label: for one that has all of it, else for one for each part. Letters that
join, or run from right to left, need Pillow's Raqm; without it they are not drawn.
"""

from __future__ import annotations

import functools
import os
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from ..subject.label import is_joiner

MOST_LETTERS = 18
MOST_WIDTH = 9  # in font sizes: about 18 letters of Latin text
_OWN = ""  # names Pillow's own font
_BITMAP_SIZES = (109, 128, 136, 160, 96, 64)  # a font of coloured bitmaps has one or a few
_UNKNOWN = "\U0010ffff"  # a code point that no font has
_STYLES = (
    "bold",
    "italic",
    "oblique",
    "math",
    "light",
    "thin",
    "black",
    "mono",
    "serif",
    "condensed",
)
_SUFFIXES = (".ttf", ".otf", ".ttc")
_NOT_LETTERS = ("lastresort", "blank")  # fonts whose glyphs stand for missing ones


@dataclass(frozen=True)
class Part:
    """Letters that one font draws; ``file``: of the font, "" for Pillow's own."""

    text: str
    file: str


def short_label(label: str, number: int) -> str:
    """What is drawn for a label: what fonts here have of it, at most MOST_LETTERS letters and
    MOST_WIDTH wide, "subject 2" where they have nothing."""
    text = " ".join("".join(part.text for part in parts(label)).split())
    letters = _letters(text)
    if not text:
        return f"subject {number}"
    while not _fits(text) and len(letters) > 1:
        letters.pop()
        text = "".join(letters).rstrip() + "~"
    return text


def _fits(text: str) -> bool:
    return len(_letters(text)) <= MOST_LETTERS and width(text, 12) <= 12 * MOST_WIDTH


@functools.lru_cache(maxsize=256)
def parts(text: str) -> tuple[Part, ...]:
    """``text`` by the fonts that draw it, without the letters that none has."""
    letters = _letters(" ".join(text.split()))
    drawable = [letter for letter in letters if _can_shape(letter)]
    whole = _font_with("".join(drawable))
    if whole is not None:
        return (Part("".join(drawable), whole),)
    found: list[Part] = []
    for letter in drawable:
        file = _font_with(letter)
        if file is None:
            continue
        if found and (found[-1].file == file or letter == " "):
            found[-1] = Part(found[-1].text + letter, found[-1].file)
        else:
            found.append(Part(letter, file))
    return tuple(found)


def width(text: str, size: int) -> int:
    """Pixels that :func:`draw` needs for a line."""
    return sum(_width(part, size) for part in parts(text))


def draw(
    page: Image.Image, place: tuple[int, int], text: str, size: int, fill: tuple[int, int, int]
) -> None:
    """Write a line on ``page``; ``place`` as in ``ImageDraw.text``: its upper left corner."""
    x, top = place
    for part in parts(text):
        font, scale = _font(part.file, size)
        y = top + round(_ascent(_OWN, size) - _ascent(part.file, size))  # one line for all
        if scale == 1:
            ImageDraw.Draw(page).text((x, y), part.text, fill=fill, font=font, embedded_color=True)
        else:
            large = round(_width(part, size) / scale), round(1.3 * size / scale)
            tile = Image.new("RGBA", large, (*fill, 0))
            ImageDraw.Draw(tile).text((0, 0), part.text, fill=fill, font=font, embedded_color=True)
            small = _width(part, size), round(1.3 * size)
            tile = tile.resize(small, Image.Resampling.LANCZOS)
            page.paste(tile, (x, y), tile)
        x += _width(part, size)


def font_folders() -> list[Path]:
    """Where this system keeps its fonts."""
    home, variable = Path.home(), os.environ.get
    if sys.platform == "win32":
        local = Path(variable("LOCALAPPDATA", home))
        return [
            Path(variable("WINDIR", "C:/Windows"), "Fonts"),
            local / "Microsoft" / "Windows" / "Fonts",
        ]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts"]
    own = variable("XDG_DATA_HOME") or str(home / ".local" / "share")
    shared = variable("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [home / ".fonts", *(Path(folder, "fonts") for folder in (own, *shared.split(":")))]


def _letters(text: str) -> list[str]:
    """Characters with all that belongs to them: marks, variation selectors, joined emoji."""
    letters: list[str] = []
    for character in text:
        mark = unicodedata.category(character) in ("Mn", "Mc", "Me") or is_joiner(character)
        skin = 0x1F3FB <= ord(character) <= 0x1F3FF
        if letters and (mark or skin or letters[-1].endswith("\u200d")):
            letters[-1] += character
        else:
            letters.append(character)
    return letters


def _can_shape(letter: str) -> bool:
    """Whether Pillow puts the signs of a letter where they belong."""
    plain = len(letter) == 1 and unicodedata.bidirectional(letter) not in ("R", "AL")
    return plain or bool(features.check("raqm"))


@functools.cache
def _fonts() -> tuple[str, ...]:
    """Files of all fonts of this machine, plain styles first."""
    found = {
        str(path)
        for folder in font_folders()
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and not any(name in path.stem.lower() for name in _NOT_LETTERS)
    }

    def rank(file: str) -> tuple[int, str]:
        name = Path(file).stem.lower()
        return sum(style in name for style in _STYLES), name

    return tuple(sorted(found, key=rank))


def _font_with(text: str) -> str | None:
    """The first font that has all of ``text``, Pillow's own before all others; None: none has."""
    signs = frozenset(text)
    return next((file for file in (_OWN, *_fonts()) if _has(file, signs)), None)


@functools.lru_cache(maxsize=65536)
def _has(file: str, signs: frozenset[str]) -> bool:
    """Whether a font has a glyph of its own for each sign."""
    drawn = signs - {" "}
    try:
        unknown = _glyph(file, _UNKNOWN)
        return all(is_joiner(sign) or _glyph(file, sign) not in (b"", unknown) for sign in drawn)
    except (OSError, ValueError):
        return False  # no font, or one that Pillow cannot read


@functools.lru_cache(maxsize=4096)
def _glyph(file: str, sign: str) -> bytes:
    """Pixels of a sign; empty where nothing is drawn."""
    font, scale = _font(file, 24)
    side = round(48 / scale)
    tile = Image.new("RGBA", (side, side))
    ImageDraw.Draw(tile).text((side // 4, 0), sign, font=font, embedded_color=True)
    return tile.tobytes() if tile.getbbox() else b""


def _width(part: Part, size: int) -> int:
    font, scale = _font(part.file, size)
    return max(1, round(font.getlength(part.text) * scale))


def _ascent(file: str, size: int) -> float:
    """Pixels from the top of a line to its letters' feet."""
    font, scale = _font(file, size)
    return font.getmetrics()[0] * scale if isinstance(font, ImageFont.FreeTypeFont) else size


@functools.lru_cache(maxsize=256)
def _font(file: str, size: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, float]:
    """A font, and what its pictures are to be scaled by: one of bitmaps has its own size."""
    if file == _OWN:
        return ImageFont.load_default(size=size), 1
    for own in (size, *_BITMAP_SIZES):
        try:
            return ImageFont.truetype(file, own), size / own
        except OSError as error:
            if "pixel size" not in str(error):
                raise
    raise OSError(f"{file}: none of the sizes {_BITMAP_SIZES}")
