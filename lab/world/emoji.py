"""The mini world's subjects: RGBA pictures of emoji with exact alpha, named, in families.

Sources (fetched by :func:`download`, never committed): npm ``@lobehub/fluent-emoji-3d`` for the
pictures and npm ``unicode-emoji-json`` for the names. Flags and symbols (keycaps, arrows, letters)
are left out. Skin tones and genders of one emoji are one family, and families never straddle the
split between training and held out.
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from PIL import Image

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES = "unicode-emoji-json@0.9.0"
HELD_OUT_FILE = Path(__file__).parent / "held_out.txt"
SPRITE_SIZE = 256  # the side of the source pictures

_SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_GENDER = {"200d", "2640", "2642", "fe0f"}
_PEOPLE = {"1f468", "1f469", "1f9d1"}  # man, woman, person
_LEFT_OUT = {"Flags", "Symbols"}
_PERSON_WORDS = r"\b(man|woman|men|women|person|people|boy|girl|child)\b"


@dataclass(frozen=True)
class Emoji:
    """One picture. ``family`` groups variants; ``name`` is what captions call it."""

    code: str
    name: str
    family: str
    file: Path

    def sprite(self) -> Image.Image:
        """RGBA, SPRITE_SIZE squared."""
        return _load(self.file)


@lru_cache(maxsize=4096)
def _load(file: Path) -> Image.Image:
    picture = Image.open(file).convert("RGBA")
    return picture.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)


def download(folder: Path) -> None:
    """Fetch both packages with the npm client into ``folder``; nothing is done when they lie there.

    Raises RuntimeError naming the package when npm fails."""
    for package in (PICTURES, NAMES):
        target = folder / package.rsplit("@", 1)[0].rsplit("/", 1)[-1]
        if (target / "package.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        run = subprocess.run(
            ["npm", "pack", package, "--json"], cwd=folder, capture_output=True, text=True
        )
        if run.returncode:
            raise RuntimeError(f"npm pack {package} failed: {run.stderr.strip()[-400:]}")
        archive = folder / json.loads(run.stdout)[0]["filename"]
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "unpacked", filter="data")
        (folder / "unpacked" / "package").rename(target)
        archive.unlink()


def load_emoji(folder: Path) -> list[Emoji]:
    """All usable emoji in a fixed order."""
    table = cast(
        dict[str, dict[str, Any]],
        json.loads((folder / "unicode-emoji-json" / "data-by-emoji.json").read_text()),
    )
    names: dict[str, tuple[str, str]] = {}
    for text, entry in table.items():
        code = _bare([f"{ord(c):x}" for c in text])
        names[code] = (str(entry["name"]), str(entry["group"]))
    found: list[Emoji] = []
    for file in sorted((folder / "fluent-emoji-3d" / "assets").glob("*.webp")):
        parts = file.stem.split("-")
        known = names.get(_bare([p for p in parts if p not in _SKIN_TONES]))
        if known is None or known[1] in _LEFT_OUT:
            continue
        name, _ = known
        found.append(Emoji(file.stem, _plain(name), _family(parts, name), file))
    return found


def split(emoji: list[Emoji]) -> tuple[list[Emoji], list[Emoji]]:
    """(training, held out) by the committed list of families."""
    held = set(HELD_OUT_FILE.read_text().split("\n"))
    return [e for e in emoji if e.family not in held], [e for e in emoji if e.family in held]


def _bare(codes: list[str]) -> str:
    return "-".join(c for c in codes if c != "fe0f")


def _plain(name: str) -> str:
    """Lower case words without punctuation, as captions use them."""
    return " ".join(re.sub(r"[^a-z0-9 ]", " ", name.lower().replace("’", "")).split())


def _family(parts: list[str], name: str) -> str:
    """Variants in skin tone and gender share a family; so do the clock faces and moon phases."""
    if re.search(r"o.clock|thirty", name):
        return "clock face"
    if re.search(r"\bmoon\b", name):
        return "moon"
    codes = [p for p in parts if p not in _SKIN_TONES | _GENDER]
    if set(codes) & _PEOPLE or re.search(_PERSON_WORDS, name.lower()):
        rest = [c for c in codes if c not in _PEOPLE]
        if not rest:
            return "person"
        if len(set(codes) & _PEOPLE) and rest:
            return "person " + "-".join(rest)
    return "-".join(codes)
