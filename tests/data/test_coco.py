"""Scenes from COCO's form of annotations, LVIS's and Open Images' included."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image
from public import media

from anystory_core.data.check import check
from anystory_core.data.index import Index
from anystory_core.data.outlines import mask_of
from anystory_core.data.schema import decode, read_words
from anystory_core.errors import DataError

CHEETAH = [270.0, 60, 420, 60, 420, 250, 270, 250]
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 17, "name": "big_cat"}, {"id": 3, "name": "sky"}]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Public photographs with annotations by hand, in the documented form."""
    images = tmp_path / "images"
    images.mkdir()
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(("cheetah.jpg", "lion.jpg", "tower.jpg")):
        shutil.copy(media() / "images" / name, images)
        with Image.open(images / name) as image:
            width, height = image.size
        rows.append({"id": number, "file_name": name, "width": width, "height": height})
    height, width = rows[1]["height"], rows[1]["width"]
    lion = np.zeros((height, width), np.uint8, order="F")
    lion[height // 4 :, width // 4 : width // 2] = 1
    packed = pycocotools.mask.encode(lion)
    inner = np.zeros_like(lion)
    inner[height // 2 : height // 2 + 40, width // 4 : width // 4 + 40] = 1
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate(([2], inner.ravel("F"), [2]))))).tolist()
    annotations = [
        {"id": 1, "image_id": 0, "category_id": 17, "iscrowd": 0, "segmentation": [CHEETAH]},
        {
            "id": 2, "image_id": 1, "category_id": 17, "iscrowd": 0,
            "segmentation": {"size": [height, width], "counts": packed["counts"].decode()},
        },
        {
            "id": 3, "image_id": 1, "category_id": 1, "iscrowd": 0,
            "segmentation": {"size": [height, width], "counts": runs},
        },
        {
            "id": 4, "image_id": 2, "category_id": 1, "iscrowd": 1,
            "segmentation": {"size": [height, width], "counts": runs},
        },
    ]  # fmt: skip
    table = {"images": rows, "annotations": annotations, "categories": CATEGORIES}
    (tmp_path / "instances.json").write_text(json.dumps(table))
    captions = [{"image_id": 1, "id": 9, "caption": " A lion\n rests. "}]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}))
    return tmp_path


def call(coco: Path, *more: object, out: str = "out") -> tuple[object, ...]:
    where = ("--annotations", coco / "instances.json", "--images", coco / "images")
    return ("coco", *where, "--out", coco / out, *more)


def change(coco: Path, action: Callable[[dict[str, Any]], object]) -> None:
    file = coco / "instances.json"
    table = json.loads(file.read_text())
    action(table)
    file.write_text(json.dumps(table))


def test_from_annotations_to_a_trained_step(coco: Path, data: Any, train: Any) -> None:
    out = data(*call(coco, "--captions", coco / "captions.json", "--licence", "CC BY 4.0"))
    assert "2 samples (2 scene) of 3 items" in out
    assert "left out, no instance of these categories: 1" in out
    cheetah, lion = Index.of([str(coco / "out")])
    for entry in (cheetah, lion):
        name = entry.key.split("/")[1]
        original = (coco / "images" / f"{name}.jpg").read_bytes()
        assert entry.files["image.jpg"].read() == original
    raw = decode(lion)
    assert raw.caption == "A lion rests." and read_words(lion) == ["big cat", "person"]
    outer, inner = raw.masks.bool()
    assert inner.sum() == 1600 and not (outer & inner).any()  # the smaller lies on top
    assert decode(cheetah).caption == "big cat"
    assert decode(cheetah).masks[0, 100, 300] == 1 and decode(cheetah).masks[0, 20, 300] == 0
    (step,) = json.loads((coco / "out" / "manifest.json").read_text())["steps"]
    assert step["source"]["licence"] == "CC BY 4.0" and step["finished"] and step["samples"] == 2
    assert step["left_out"] == {"no instance of these categories": 1}
    assert check([str(coco / "out")])[1]
    train(coco / "out", "router")


def test_filters(coco: Path, data: Any) -> None:
    out = data(*call(coco, "--categories", "person", out="people"))
    assert "1 samples" in out
    (entry,) = Index.of([str(coco / "people")])
    assert len(decode(entry).masks) == 1
    out = data(*call(coco, "--least-area", 0.05, "--most-subjects", 1, out="large"))
    assert "2 samples" in out
    out = data(*call(coco, "--most-subjects", 1, out="single"))
    assert "left out, more than 1 subjects: 1" in out
    out = data(*call(coco, "--least-subjects", 2, out="several"))
    assert "left out, fewer than 2 subjects: 1" in out
    code, _, error = data.ended(*call(coco, "--categories", "dog", out="dogs"))
    assert code == 1 and "['dog'] are not in" in error and "big cat" in error


def test_lvis_and_open_images(coco: Path, data: Any) -> None:
    """LVIS names pictures by address and has no crowds; Open Images has words for ids."""

    def differently(table: dict[str, Any]) -> None:
        for row in table["images"]:
            name = row.pop("file_name")
            if row["id"] == 0:
                row["coco_url"] = f"http://images.cocodataset.org/images/{name}"
            else:
                row["id"] = f"{row['id']:04x}"
        for row in table["annotations"]:
            row["isgroupof"] = row.pop("iscrowd")
            if row["image_id"] == 1:
                row["image_id"] = "0001"

    change(coco, differently)
    (coco / "images" / "lion.jpg").rename(coco / "images" / "0001.jpg")
    (coco / "images").rename(coco / "kept")
    (coco / "images").mkdir()
    (coco / "kept").rename(coco / "images" / "images")
    shutil.copy(coco / "images" / "images" / "0001.jpg", coco / "images")
    assert "2 samples" in data(*call(coco))
    keys = [entry.key for entry in Index.of([str(coco / "out")])]
    assert keys == ["out/0001", "out/images/cheetah"]


def test_what_is_damaged_is_named_and_counted(coco: Path, data: Any) -> None:
    def damage(table: dict[str, Any]) -> None:
        original = table["images"][0]
        for number in range(3, 7):
            table["images"].append({**original, "id": number, "file_name": f"{number}.jpg"})
            table["annotations"].append({**table["annotations"][0], "image_id": number})
        table["annotations"][-1]["segmentation"] = [[0, 0, 1e9, 5, 5, 1e9]]
        table["images"][-2]["width"] = 5

    change(coco, damage)
    whole = (coco / "images" / "cheetah.jpg").read_bytes()
    (coco / "images" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    for number in (5, 6):
        (coco / "images" / f"{number}.jpg").write_bytes(whole)
    out = data(*call(coco))
    assert "2 samples (2 scene) of 7 items" in out and "left out, damaged: 4" in out
    assert "3.jpg is not a picture" in out and "4.jpg is not in" in out
    assert "5.jpg is" in out and "its annotations are for 5x" in out
    assert "6.jpg: a polygon leaves the picture" in out


@pytest.mark.parametrize("upright", [False, True])
def test_lying_photographs(coco: Path, data: Any, upright: bool) -> None:
    """A phone saves them lying; masks are turned with them, unless they were made upright."""
    lying = np.zeros((32, 64, 3), np.uint8)
    lying[:, :16] = 255
    note = Image.Exif()
    note[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(lying).save(file, "PNG", exif=note)
    (coco / "images" / "cheetah.jpg").write_bytes(file.getvalue())

    def annotate(table: dict[str, Any]) -> None:
        box = [0, 0, 32, 0, 32, 16, 0, 16] if upright else [0, 0, 16, 0, 16, 32, 0, 32]
        size = {"width": 32, "height": 64} if upright else {"width": 64, "height": 32}
        table["images"] = [{**table["images"][0], **size}]
        table["annotations"] = [{**table["annotations"][0], "segmentation": [box]}]

    change(coco, annotate)
    data(*call(coco))
    (entry,) = Index.of([str(coco / "out")])
    assert "image.png" in entry.files  # by what it is, not by what it is called
    raw = decode(entry)
    white = raw.target.mean(-1) > 0.5
    assert white.sum() == 512 and (raw.masks[0].bool() == white).all()


SEGMENTATIONS: list[tuple[Any, str]] = [
    (None, "expected polygons or run lengths"),
    ([[1, 2, 3]], "no list of x and y"),
    ([["a", 2, 3, 4, 5, 6]], "no list of x and y"),
    ([[1, 2, 3, 4]], "without a polygon of three points"),
    ([[0, 0, float("nan"), 5, 5, 5]], "leaves the picture"),
    ({"counts": [5, 5]}, "cover 10 pixels of 100"),
    ({"counts": [-5, 105]}, "no list of numbers within the picture"),
    ({"counts": [10**30, 5]}, "no whole numbers"),
    ({"counts": "many"}, "letters that do not belong there"),
    ({"counts": "PPo"}, "in the middle of a number"),
    ({"size": [9, 9], "counts": [100]}, r"for a picture of \[9, 9\]"),
    ({}, "no whole numbers|no list of numbers"),
]


@pytest.mark.parametrize(("segmentation", "words"), SEGMENTATIONS)
def test_segmentations_that_are_none(segmentation: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        mask_of(segmentation, (10, 10))


def test_run_lengths_are_read_as_pycocotools_reads_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        size = tuple(int(n) for n in rng.integers(1, 60, 2))
        mask = np.asfortranarray(rng.random(size) < rng.random(), np.uint8)
        packed = pycocotools.mask.encode(mask)
        text = {"size": list(size), "counts": packed["counts"].decode()}
        assert np.array_equal(mask_of(text, size), mask.astype(bool))


def test_polygons_are_drawn_in_a_box_as_in_the_whole_picture() -> None:
    rng = np.random.default_rng(1)
    for _ in range(400):
        height, width = (int(n) for n in rng.integers(1, 60, 2))
        polygons: list[list[float]] = []
        for _ in range(int(rng.integers(1, 4))):
            middle, reach = rng.uniform(-5, 65, 2), rng.uniform(0, 30)
            points = middle + rng.uniform(-reach, reach, (int(rng.integers(3, 9)), 2))
            points = points.round(int(rng.integers(0, 3))).clip(-2, 2 * max(height, width))
            polygons.append(points.clip(0, (width, height)).ravel().tolist())
        runs = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, height, width))
        whole = pycocotools.mask.decode(runs).astype(bool)
        assert np.array_equal(mask_of(polygons, (height, width)), whole)


def test_annotation_files_that_are_none(coco: Path, data: Any) -> None:
    file = coco / "instances.json"
    table = json.loads(file.read_text())
    for content, words in [
        ("{", "is no JSON file"),
        ("[]", "holds no table"),
        (json.dumps({"images": []}), "no list of categories"),
        (json.dumps(copy.deepcopy(table) | {"annotations": 5}), "no list of annotations"),
    ]:
        file.write_text(content)
        code, _, error = data.ended(*call(coco))
        assert code == 1 and words in error
