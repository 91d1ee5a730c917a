"""Scenes from instance annotations in COCO's form: pictures, polygons or run lengths.

LVIS's files (pictures named by coco_url) and Open Images' in this form (ids that are words, group
flags) are read too. Crowds and groups are left out. Where instances overlap, the smaller lies on
top. Pictures go into the shards as the bytes they are.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import DataError
from .. import paths
from ..convert import Filtered, Made, each
from ..outlines import outline_of
from ..pictures import png, size_of
from ..shards import Files, key_of, picture_files, words_json
from .options import add_common, convert

_GROUPS = ("iscrowd", "isgroupof", "IsGroupOf", "is_group_of", "ignore")
# How Pillow turns a picture by the note of its camera.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Instance:
    """One annotation: what it is, and its outline as the file has it."""

    word: str
    segmentation: Any


@dataclass(frozen=True)
class Picture:
    """A picture with its annotations. ``size``: (height, width) they were made for, if said."""

    name: str  # its file, from the folder on
    size: tuple[int, int] | None
    instances: tuple[Instance, ...]
    caption: str


@dataclass(frozen=True)
class Scenes:
    """Pictures -> scenes. ``least_area``: of a subject, as a share of the picture."""

    folder: str
    least_area: float
    least_subjects: int
    most_subjects: int

    def samples(self, items: Sequence[Picture]) -> Iterator[Made]:
        return each(items, self._scene)

    def _scene(self, item: Picture) -> Iterable[tuple[str, Files]]:
        if not item.instances:
            raise Filtered("no instance of these categories")
        path = paths.join(self.folder, item.name)
        try:
            content = paths.read(path)
        except FileNotFoundError as error:
            raise DataError(f"{item.name} is not in {self.folder}") from error
        kind, stored, turn = size_of(content, item.name)
        size, turned = _annotated_size(item, stored, turn)
        least = max(1, self.least_area * size[0] * size[1])
        labels, words = _paint(item.instances, size, least)
        if len(words) < self.least_subjects:
            raise Filtered(f"fewer than {self.least_subjects} subjects")
        if len(words) > self.most_subjects:
            raise Filtered(f"more than {self.most_subjects} subjects")
        if turned:
            labels = np.array(Image.fromarray(labels).transpose(_TURNS[turn]))
        caption = item.caption or listed(words)
        yield (
            key_of(item.name),
            {
                **picture_files("image", content, kind, item.name),
                "masks.png": png(labels),
                "caption.txt": caption.encode(),
                **words_json(words),
            },
        )


def _paint(
    instances: Sequence[Instance], size: tuple[int, int], least: float
) -> tuple[NDArray[Any], list[str]]:
    """(labels (H,W), the words of those that are seen): the smaller lies on top; instances of
    which fewer than ``least`` pixels are seen are background."""
    outlines = [(outline_of(one.segmentation, size), one.word) for one in instances]
    found = [(outline.area, outline, word) for outline, word in outlines]
    found = sorted((one for one in found if one[0] >= least), key=lambda one: -one[0])
    labels = np.zeros(size, np.uint8 if len(found) < 256 else np.uint16)
    for number, (_, outline, _) in enumerate(found, 1):
        outline.paint(labels, number)
    seen = np.array([area for area, _, _ in found])
    if np.count_nonzero(labels) < seen.sum():  # they overlap
        seen = np.bincount(labels.ravel(), minlength=len(found) + 1)[1:]
        kept = seen >= least
        if not kept.all():
            numbers = np.concatenate(([0], np.where(kept, np.cumsum(kept), 0)))
            labels = numbers.astype(labels.dtype)[labels]
            found = [one for one, there in zip(found, kept, strict=True) if there]
    return labels, [word for _, _, word in found]


def listed(words: Sequence[str]) -> str:
    """A caption of names: "a photo of a dog, two people" has to come from a model; this is "dog,
    person (2)"."""
    counts = Counter(words)
    return ", ".join(w if n == 1 else f"{w} ({n})" for w, n in counts.items())


def _annotated_size(
    item: Picture, stored: tuple[int, int], turn: int
) -> tuple[tuple[int, int], bool]:
    """((height, width) of the annotations, whether their masks are to be turned with the picture).
    DataError when they are of another picture."""
    lying = (stored[1], stored[0])
    upright = stored if turn >= 5 else lying
    if item.size is None or item.size == lying:
        return lying, turn > 1
    if item.size == upright:
        return upright, False
    raise DataError(
        f"{item.name} is {stored[0]}x{stored[1]}, its annotations are for "
        f"{item.size[1]}x{item.size[0]}"
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", required=True, help="instance annotations (JSON)")
    parser.add_argument("--images", required=True, help="the folder of their pictures")
    parser.add_argument(
        "--captions", default="", help="COCO's captions of the same pictures (JSON)"
    )
    parser.add_argument("--categories", default="", help="names, by commas; default: all")
    parser.add_argument(
        "--least-area",
        type=float,
        default=0.005,
        help="of a subject, as a share of the picture; smaller ones are background; "
        "default: %(default)s",
    )
    parser.add_argument("--least-subjects", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--most-subjects",
        type=int,
        default=20,
        help="pictures with more are left out; default: %(default)s",
    )
    add_common(parser)


def run(options: argparse.Namespace) -> int:
    items = read_annotations(options.annotations, options.captions, options.categories)
    settings = {
        name: getattr(options, name)
        for name in ("categories", "captions", "least_area", "least_subjects", "most_subjects")
    }
    source = {"annotations": options.annotations, "images": options.images}
    scenes = Scenes(
        options.images, options.least_area, options.least_subjects, options.most_subjects
    )
    return convert("coco", options, source, settings, items, scenes)


def read_annotations(path: str, captions: str = "", categories: str = "") -> list[Picture]:
    """The pictures of an annotation file in its order. DataError names what it lacks."""
    table = _table(path)
    names = {
        str(c.get("id")): str(c.get("name")).replace("_", " ")
        for c in _rows(table, "categories", path)
    }
    wanted = {word.strip() for word in categories.split(",")} - {""}
    unknown = wanted - set(names.values())
    if unknown:
        raise DataError(
            f"categories: {sorted(unknown)} are not in {path}, which has "
            f"{', '.join(sorted(names.values())[:20])}"
        )
    texts = _captions(captions) if captions else {}
    found: dict[str, list[Instance]] = {}
    for row in _rows(table, "annotations", path):
        word = names.get(str(row.get("category_id")), "")
        if any(row.get(flag) for flag in _GROUPS) or (wanted and word not in wanted):
            continue
        instance = Instance(word, row.get("segmentation"))
        found.setdefault(str(row.get("image_id")), []).append(instance)
    pictures: list[Picture] = []
    for row in _rows(table, "images", path):
        number = str(row.get("id"))
        height, width = row.get("height"), row.get("width")
        size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        instances = tuple(found.get(number, ()))
        pictures.append(Picture(_file(row), size, instances, texts.get(number, "")))
    return pictures


def _file(row: Mapping[str, Any]) -> str:
    """A picture's file; LVIS gives its address, whose last two parts are folder and file."""
    if row.get("file_name"):
        return str(row["file_name"])
    if row.get("coco_url"):
        return "/".join(str(row["coco_url"]).split("/")[-2:])
    return f"{row.get('id')}.jpg"


def _captions(path: str) -> dict[str, str]:
    """The first caption of each picture."""
    texts: dict[str, str] = {}
    for row in _rows(_table(path), "annotations", path):
        texts.setdefault(str(row.get("image_id")), " ".join(str(row.get("caption") or "").split()))
    return texts


def _table(path: str) -> Mapping[str, Any]:
    try:
        table = json.loads(paths.read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON file ({error})") from error
    if not isinstance(table, dict):
        raise DataError(f"{path} holds no table; expected images, annotations and categories")
    return cast("Mapping[str, Any]", table)


def _rows(table: Mapping[str, Any], name: str, path: str) -> list[Mapping[str, Any]]:
    rows: Any = table.get(name)
    if not isinstance(rows, list):
        raise DataError(f"{path} has no list of {name}; is it an annotation file of instances?")
    return [row for row in cast("list[Any]", rows) if isinstance(row, dict)]
