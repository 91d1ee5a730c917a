"""Which files make a sample: the grammar of ``KEY.SUFFIX`` that folders and shards share.

A suffix is PART.EXT, as in ``target.png``; a key may have dots of its own, since it ends where the
first known suffix begins (``IMG.2024.image.png`` is ``image.png`` of ``IMG.2024``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Literal

Kind = Literal["pair", "scene", "group"]

PICTURES = ("png", "jpg", "jpeg", "webp")
PARTS = ("reference", "target", "reference_mask", "target_mask", "image", "masks", "caption")
WORDS = "words.json"

_VIEW = re.compile(r"view\d{1,3}")
_SUFFIX = re.compile(
    r"\.((?:(?:reference|target|view\d{1,3})(?:_mask)?|image|masks)\.(?:png|jpe?g|webp)"
    r"|(?:view\d{1,3}_)?caption\.txt|words\.json|encoding\.safetensors)$",
    re.IGNORECASE,
)


def split_name(name: str) -> tuple[str, str] | None:
    """File name -> (key, suffix as written); None when no known suffix ends it."""
    found = _SUFFIX.search(name)
    return None if found is None or not found.start() else (name[: found.start()], found[1])


def kind_of(names: Iterable[str]) -> Kind | None:
    """What files with these suffixes make of a sample; None when some are missing."""
    stems = {name.lower().rpartition(".")[0] for name in names}
    views = [stem for stem in stems if _VIEW.fullmatch(stem)]
    if len(views) > 1 and ("caption" in stems or all(f"{v}_caption" in stems for v in views)):
        return "group"
    if {"reference", "target", "caption"} <= stems:
        return "pair"
    return "scene" if {"image", "masks", "caption"} <= stems else None


def views_of_group(names: Iterable[str]) -> list[str]:
    """The views of a group in order: "view0", "view1", ..."""
    stems = {name.lower().rpartition(".")[0] for name in names}
    return sorted((s for s in stems if _VIEW.fullmatch(s)), key=lambda s: (int(s[4:]), s))


def unknown(names: Iterable[str]) -> list[str]:
    """Those of a sample's suffixes that are no part of one."""
    return sorted(name for name in names if split_name(f"key.{name}") is None)


def is_meant_as_part(suffix: str) -> bool:
    """Whether an unknown suffix looks like a part with a wrong name (``ref_mask.png``,
    ``target.bmp``) and not like another tool's note on the sample (``json``, ``url``)."""
    return "." in suffix


def advice(suffix: str) -> str:
    """What an unknown suffix should perhaps have been, in words."""
    stem, _, extension = suffix.lower().rpartition(".")
    if stem in PARTS or _VIEW.fullmatch(stem):
        return f"{stem} is read from {'txt' if stem == 'caption' else ', '.join(PICTURES)} files"
    known = [*PARTS, "view0", "view0_mask", "view0_caption"]
    near = difflib.get_close_matches(stem or extension, known, n=1, cutoff=0.5)
    if stem == "ref_mask" or stem == "ref":
        near = [stem.replace("ref", "reference")]
    return f"perhaps {near[0]} is meant" if near else "see docs/data.md for the parts of a sample"
