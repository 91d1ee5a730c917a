"""Pairs from DeepFashion2: a garment as the shop shows it, and worn by customers.

Reads its folders ``image/`` and ``annos/`` (one JSON file a picture). Pictures of one pair_id show
the same clothes; items of them with the same style, above 0, and category are one garment. Each
customer's picture of a garment is the target of one pair, whose reference is a shop's picture of
it; masks are made of the polygons.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from ...errors import DataError
from .. import paths
from ..convert import Made, Unread, each
from ..outlines import mask_of
from ..pictures import size_of
from ..shards import Files, mask_png, picture_files, words_json
from .options import add_common, convert

_THREADS = 16  # that read small files


@dataclass(frozen=True)
class Garment:
    """One item of one picture."""

    picture: str  # such as "000001"
    item: str  # such as "item1"
    word: str
    segmentation: Any


@dataclass(frozen=True)
class Match:
    """One garment twice."""

    shop: Garment
    user: Garment

    @property
    def name(self) -> str:
        return f"{self.shop.picture}-{self.shop.item}-{self.user.picture}-{self.user.item}"


@dataclass(frozen=True)
class Pairs:
    """Matches -> pairs. ``folder`` holds ``image/``."""

    folder: str
    caption: str

    def samples(self, items: Sequence[Match | Unread]) -> Iterator[Made]:
        return each(items, self._pair)

    def _pair(self, match: Match) -> Iterable[tuple[str, Files]]:
        text = self.caption.replace("{word}", match.user.word)
        files: dict[str, bytes] = {"caption.txt": text.encode(), **words_json([match.user.word])}
        for part, garment in (("reference", match.shop), ("target", match.user)):
            name = f"{garment.picture}.jpg"
            content = paths.read(paths.join(paths.join(self.folder, "image"), name))
            kind, (width, height), turn = size_of(content, name)
            if turn > 1:
                raise DataError(f"{name} is turned by its EXIF note, and its outlines are not")
            mask = mask_of(garment.segmentation, (height, width))
            if not mask.any():
                raise DataError(f"{name}: the outline of {garment.item} is empty")
            files |= {
                **picture_files(part, content, kind, name),
                f"{part}_mask.png": mask_png(mask),
            }
        yield match.name, files


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="with image/ and annos/, such as train/")
    parser.add_argument(
        "--caption",
        default="a person wearing a {word}",
        help="of every target; {word} is the garment; default: %(default)s",
    )
    add_common(parser)


def run(options: argparse.Namespace) -> int:
    items = read_annotations(options.folder)
    pairs = Pairs(options.folder, options.caption)
    settings = {"caption": options.caption}
    return convert("deepfashion2", options, {"folder": options.folder}, settings, items, pairs)


def read_annotations(folder: str) -> list[Match | Unread]:
    """All matches, by pair_id, after the annotation files that are none."""
    notes = paths.join(folder, "annos")
    if not paths.is_folder(notes):
        raise DataError(f"{folder} has no folder annos/; name DeepFashion2's train/ or validation/")
    files = paths.list_files(notes, (".json",))
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = list(pool.map(_table, files))
    found: dict[tuple[int, int, str], dict[str, list[Garment]]] = {}
    items: list[Match | Unread] = []
    for path, table in zip(files, tables, strict=True):
        picture = paths.name_of(path).rpartition(".")[0]
        if isinstance(table, str):
            items.append(Unread(paths.name_of(path), f"{paths.name_of(path)}: {table}"))
            continue
        for name, item in sorted(table.items()):
            if not name.startswith("item") or not isinstance(item, Mapping):
                continue
            row = cast("Mapping[str, Any]", item)
            style, number, word = row.get("style"), table.get("pair_id"), row.get("category_name")
            if not isinstance(style, int) or not isinstance(number, int) or style <= 0:
                continue
            garment = Garment(picture, name, str(word), row.get("segmentation"))
            sides = found.setdefault((number, style, str(word)), {})
            sides.setdefault(str(table.get("source")), []).append(garment)
    items += [
        Match(shops[number % len(shops)], user)
        for _, sides in sorted(found.items())
        if (shops := sides.get("shop"))
        for number, user in enumerate(sides.get("user", []))
    ]
    return items


def _table(path: str) -> Mapping[str, Any] | str:
    """An annotation file's table, or why it is none."""
    try:
        table = json.loads(paths.read(path))
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    return cast("Mapping[str, Any]", table) if isinstance(table, dict) else "no table"
