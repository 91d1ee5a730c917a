"""Pairs from DeepFashion2's folders and from parquet files of Hugging Face's."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from public import media

from anystory_core.data.check import check
from anystory_core.data.index import Index
from anystory_core.data.schema import decode


def picture(name: str) -> bytes:
    return (media() / "images" / name).read_bytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Two garments of one pair_id, by hand in the documented form: the first in two shop pictures
    and three of customers, the second (style 0) not to be matched."""
    folder = tmp_path / "train"
    for name in ("image", "annos"):
        (folder / name).mkdir(parents=True)
    for number in range(5):
        name = "lion.jpg" if number < 2 else "cheetah.jpg"
        shutil.copy(media() / "images" / name, folder / "image" / f"{number:06d}.jpg")
        box = [[40.0, 50, 140, 50, 140, 150 + number, 40, 150 + number]]
        item = {
            "segmentation": box, "scale": 2, "viewpoint": 1, "zoom_in": 1, "style": 1,
            "bounding_box": [40, 50, 140, 150], "category_id": 1, "occlusion": 1,
            "category_name": "short sleeve top", "landmarks": [],
        }  # fmt: skip
        table = {
            "source": "shop" if number < 2 else "user", "pair_id": 7, "item1": item,
            "item2": {**item, "style": 0}, "item3": {**item, "category_name": "trousers"},
        }  # fmt: skip
        if number == 4:
            del table["item3"]
        (folder / "annos" / f"{number:06d}.json").write_text(json.dumps(table))
    return folder


def test_garments_in_the_shop_and_worn(fashion: Path, data: Any, train: Any) -> None:
    out = fashion.parent / "out"
    assert "5 samples (5 pair)" in data("deepfashion2", fashion, "--out", out)
    first = Index.of([str(out)])[0]
    assert first.key == "out/000000-item1-000002-item1"
    assert first.files["target.jpg"].read() == (fashion / "image" / "000002.jpg").read_bytes()
    raw = decode(first)
    assert raw.reference_mask is not None and raw.caption == "a person wearing a short sleeve top"
    assert raw.reference_mask[60, 60] == 1 and raw.reference_mask[40, 60] == 0
    assert float(raw.masks[0].sum()) == 100 * 102
    keys = [entry.key for entry in Index.of([str(out)])]
    assert {key.split("-")[2] for key in keys} == {"000002", "000003", "000004"}
    assert {key.split("/")[1][:6] for key in keys} == {"000000", "000001"}  # shops in turn
    train(out, "subject", subject={"inside": 1.0})


def test_damaged_garments(fashion: Path, data: Any) -> None:
    (fashion / "image" / "000002.jpg").write_bytes(b"no picture")
    (fashion / "image" / "000003.jpg").unlink()
    (fashion / "annos" / "000001.json").write_text("[]")
    out = data("deepfashion2", fashion, "--out", fashion.parent / "out")
    assert "000001.json: no table" in out and "left out, damaged: 5" in out
    assert "000002.jpg is not a picture" in out and "1 samples" in out
    code, _, error = data.ended("deepfashion2", fashion / "image", "--out", fashion.parent / "x")
    assert code == 1 and "no folder annos/" in error


def halves(padding: int) -> bytes:
    both = np.full((64 + 2 * padding, 2 * (64 + 2 * padding), 3), 255, np.uint8)
    both[padding:-padding, padding : padding + 64] = (200, 0, 0)
    both[padding:-padding, -padding - 64 : -padding] = (0, 0, 200)
    file = io.BytesIO()
    Image.fromarray(both).save(file, "PNG")
    return file.getvalue()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def test_two_halves(tmp_path: Path, data: Any, train: Any) -> None:
    """As Subjects200K has them."""
    rows = [
        {
            "image": {"bytes": halves(8), "path": f"{i}.png"},
            "description": {"item": "cube", "description_0": "a red one", "description_1": "blue "},
            "quality": {"score": i},
        }
        for i in range(5)
    ]
    rows[4]["image"] = {"bytes": None, "path": "4.png"}
    write(tmp_path / "train.parquet", rows)
    out = data(
        "parquet", tmp_path / "train.parquet", "--halves", "image", "--padding", 8,
        "--caption", "description.description_1", "--at-least", "quality.score=1",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert "3 samples (3 pair) of 5 items" in out and "quality.score below 1: 1" in out
    assert "train.parquet:4: image holds no picture's bytes" in out
    raw = decode(Index.of([str(tmp_path / "out")])[0])
    assert raw.caption == "blue" and raw.target.shape == (64, 64, 3)
    assert raw.reference is not None and raw.reference[..., 0].min() > 0.7
    assert raw.target[..., 2].min() > 0.7 and raw.target[..., 0].max() == 0
    train(tmp_path / "out", "subject")


def test_two_columns_and_both_ways(tmp_path: Path, data: Any, train: Any) -> None:
    row = {
        "a": {"bytes": picture("cheetah.jpg"), "path": None}, "b": picture("lion.jpg"),
        "text": ["a lion"], "other": "a cheetah",
    }  # fmt: skip
    (tmp_path / "files").mkdir()
    for number in range(2):
        write(tmp_path / "files" / f"{number}.parquet", [row] * 3)
    columns = ("--reference", "a", "--target", "b", "--caption", "text")
    data("parquet", tmp_path / "files", *columns, "--out", tmp_path / "pairs")
    index = Index.of([str(tmp_path / "pairs")])
    assert len(index) == 6 and index[0].files["reference.jpg"].read() == row["a"]["bytes"]
    more = ("--both-ways", "--reference-caption", "other", "--out", tmp_path / "groups")
    data("parquet", tmp_path / "files", *columns, *more)
    entry = Index.of([str(tmp_path / "groups")])[0]
    assert decode(entry, ("view1", "view0")).caption == "a cheetah"
    assert decode(entry, ("view0", "view1")).caption == "a lion"
    assert check([str(tmp_path / "groups")])[1]


def test_parquet_files_that_are_none(tmp_path: Path, data: Any) -> None:
    file = tmp_path / "a.parquet"
    write(file, [{"image": halves(8)}])
    where = ("--out", tmp_path / "out")
    for more, words in [
        (("--halves", "picture"), "no column picture; it has image"),
        (("--halves", "image", "--at-least", "x"), "expected COLUMN=NUMBER"),
        (("--reference", "image"), "name --halves, or --reference and --target"),
    ]:
        code, _, error = data.ended("parquet", file, *more, *where)
        assert code == 1 and words in error
    file.write_bytes(file.read_bytes()[:-30])
    code, _, error = data.ended("parquet", file, "--halves", "image", *where)
    assert code == 1 and "is no parquet file" in error
    write(tmp_path / "b.parquet", [{"image": halves(8)}])
    said = data("parquet", file, tmp_path / "b.parquet", "--halves", "image", *where)
    assert "1 samples (1 pair) of 2 items" in said and "is no parquet file" in said
