"""500 damaged inputs over all commands: no crash, no half-written shard, and a manifest that counts
what was left out."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from public import films, media

from anystory_core.data import shards
from anystory_core.data.__main__ import main
from anystory_core.data.index import Index
from anystory_core.data.manifest import read_steps
from anystory_core.data.schema import decode
from anystory_core.errors import DataError

COUNTS = {
    "coco": 130, "segmentations": 60, "annotations": 40, "renders": 40, "models": 30,
    "video": 30, "parquet": 50, "deepfashion2": 40, "masks": 30, "captions": 20, "check": 30,
}  # fmt: skip


def test_they_are_500() -> None:
    assert sum(COUNTS.values()) == 500


def damaged(content: bytes, kind: str) -> Iterator[bytes]:
    """As many damaged copies as are wanted of a kind: cut off, overwritten, shifted, emptied."""
    rng = random.Random(kind)
    for number in range(COUNTS[kind]):
        data = bytearray(content)
        place = rng.randrange(len(data))
        how = number % 6
        if how == 0:
            del data[place:]
        elif how == 1:
            for _ in range(1 + len(data) // 500):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif how == 2:
            data[place : place + 64] = bytes(64)
        elif how == 3:
            data[place:place] = rng.randbytes(40)
        elif how == 4:
            data[: min(64, place)] = rng.randbytes(min(64, place))
        else:
            data = bytearray(rng.randbytes(rng.randrange(200)))
        yield bytes(data)


def ended(out: Path, *arguments: object) -> dict[str, Any]:
    """Run a command; what its manifest says, after a look at all that it wrote."""
    code = main([*map(str, arguments), "--out", str(out)])
    assert code in (0, 1)
    assert not [file.name for file in out.iterdir() if ".tmp" in file.name]
    (step,) = read_steps(str(out))
    assert step["finished"]
    if list(out.glob("*.tar")):
        entries = list(Index.of([str(out)]))
        assert len(entries) == step["samples"] == sum(step["kinds"].values())
        for entry in entries:
            try:
                decode(entry)
            except DataError as error:  # a whole file, whose picture has nothing in it
                assert "views are the same picture" in str(error) or "transparent" in str(error)
    else:
        assert step["samples"] == 0
    return step


def accounted(step: dict[str, Any]) -> bool:
    return step["samples"] + sum(step["left_out"].values()) == step["items"]


def annotations(count: int) -> dict[str, Any]:
    box = [[10, 10, 90, 10, 90, 90, 10, 90]]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(count)],
        "annotations": [
            {"image_id": i, "category_id": 1, "segmentation": box} for i in range(count)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }


@pytest.fixture
def photograph() -> bytes:
    return (media() / "images" / "cheetah1.jpg").read_bytes()


def coco(folder: Path, table: dict[str, Any]) -> tuple[object, ...]:
    (folder / "instances.json").write_text(json.dumps(table))
    where = ("--annotations", folder / "instances.json", "--images", folder / "images")
    return ("coco", *where, "--least-area", 0, "--workers", 1)


def test_coco(tmp_path: Path, photograph: bytes) -> None:
    (tmp_path / "images").mkdir()
    for number, content in enumerate(damaged(photograph, "coco")):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(content)
    step = ended(tmp_path / "pictures", *coco(tmp_path, annotations(COUNTS["coco"])))
    assert accounted(step) and step["left_out"]["damaged"] > 40

    text = json.dumps([[10, 10, 90, 10, 90.5, 90, 10, 90], {"counts": [4, 5, 90]}]).encode()
    segmentations: list[Any] = []
    for content in damaged(text, "segmentations"):
        try:
            segmentations.append(json.loads(content))
        except ValueError:
            segmentations.append(content.decode("latin-1"))
    table = annotations(len(segmentations))
    for row, segmentation in zip(table["annotations"], segmentations, strict=True):
        row["segmentation"] = segmentation
    for number in range(len(segmentations)):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(photograph)
    step = ended(tmp_path / "segmentations", *coco(tmp_path, table))
    assert accounted(step) and step["left_out"]["damaged"] > 30

    call = coco(tmp_path, annotations(3))
    whole = (tmp_path / "instances.json").read_bytes()
    refused = 0
    for number, content in enumerate(damaged(whole, "annotations")):
        (tmp_path / "instances.json").write_bytes(content)
        out = tmp_path / f"out{number}"
        code = main([*map(str, call), "--out", str(out)])
        refused += code
        assert code in (0, 1) and (out.exists() or code)
    assert refused > 20


def test_views(tmp_path: Path, photograph: bytes) -> None:
    things = tmp_path / "renders"
    for number, content in enumerate(damaged(photograph, "renders")):
        (things / str(number)).mkdir(parents=True)
        (things / str(number) / "0.jpg").write_bytes(photograph)
        (things / str(number) / "1.jpg").write_bytes(content)
    assert accounted(ended(tmp_path / "out", "views", things, "--workers", 1))


def test_models(tmp_path: Path, data: Any) -> None:
    """In processes of their own: VTK may take its process down with a file."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("Duck.glb", "Fox.gltf", "face.obj"):
        content = (media() / "models3d" / name).read_bytes()
        copies = list(damaged(content, "models"))[: COUNTS["models"] // 3]
        for number, copy in enumerate(copies):
            (folder / f"{number}{name}").write_bytes(copy)
    out = tmp_path / "out"
    process = data.apart(
        "views", folder, "--size", 32, "--views", 2, "--workers", 2, "--per-shard", 6, "--out", out
    )
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    (step,) = read_steps(str(out))
    assert accounted(step) and step["left_out"]["damaged"] > 10 and step["items"] == 30
    assert len(Index.of([str(out)])) == step["samples"] > 0


def test_video(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    film = (films() / "carphone_distorted.mp4").read_bytes()
    for number, content in enumerate(damaged(film, "video")):
        (folder / f"{number}.mp4").write_bytes(content)
    step = ended(tmp_path / "out", "video", folder, "--workers", 1)
    assert accounted(step) and step["left_out"]["damaged"] > 10


def test_parquet(tmp_path: Path, photograph: bytes) -> None:
    rows = [{"a": photograph, "b": photograph[:-2] + b"xx", "text": "a cat"}] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "files").mkdir()
    for number, content in enumerate(damaged(whole, "parquet")):
        (tmp_path / "files" / f"{number}.parquet").write_bytes(content)
    call = ("parquet", tmp_path / "files", "--reference", "a", "--target", "b", "--caption", "text")
    step = ended(tmp_path / "out", *call, "--workers", 1)
    assert accounted(step) and step["left_out"]["damaged"] > 20


def test_deepfashion2(tmp_path: Path, photograph: bytes) -> None:
    for name in ("image", "annos"):
        (tmp_path / name).mkdir()
    box = [[10, 10, 90, 10, 90, 90, 10, 90]]
    item = {"style": 1, "category_name": "trousers", "segmentation": box}
    pictures, notes = damaged(photograph, "deepfashion2"), None
    for number in range(COUNTS["deepfashion2"]):
        for source in ("shop", "user"):
            table = {"source": source, "pair_id": number, "item1": item}
            name = f"{number:04d}{source}"
            content = json.dumps(table).encode()
            notes = damaged(content, "deepfashion2") if notes is None else notes
            broken = number % 2 and source == "user"
            (tmp_path / "annos" / f"{name}.json").write_bytes(next(notes) if broken else content)
            picture = next(pictures) if not number % 2 and source == "user" else photograph
            (tmp_path / "image" / f"{name}.jpg").write_bytes(picture)
    step = ended(tmp_path / "out", "deepfashion2", tmp_path, "--workers", 1)
    assert accounted(step) and step["left_out"]["damaged"] > 20


@pytest.mark.parametrize("command", ["masks", "captions"])
def test_commands_with_models(tmp_path: Path, photograph: bytes, command: str) -> None:
    """What cannot be worked on stays in its shard, and is counted."""
    kind = {"masks": "mask2former", "captions": "qwen2_vl"}[command]
    getattr(models, f"write_{kind}")(tmp_path / "model")
    samples = [
        (f"{i:03d}", {"image.jpg": content, "caption.txt": b"a cat"})
        for i, content in enumerate(damaged(photograph, command))
    ]
    shards.write_shards(samples, tmp_path / "in", per_shard=10)
    more = ("--least-score", 0) if command == "masks" else ()
    call = (command, tmp_path / "in", "--model", tmp_path / "model", "--workers", 1, *more)
    assert main([*map(str, call), "--out", str(tmp_path / "out")]) == 0
    (step,) = read_steps(str(tmp_path / "out"))
    assert (
        step["samples"]
        == step["items"]
        == COUNTS[command]
        == len(step["bad"]) + step["samples"] - len(step["bad"])
    )
    assert step["left_out"]["damaged, left as it was"] > 8
    entries = list(Index.of([str(tmp_path / "out")]))
    assert [e.files["image.jpg"].read() for e in entries] == [f["image.jpg"] for _, f in samples]


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples that are damaged are named; shards that are are refused by a sentence."""
    (_, scene), *_ = tiny.scenes(1)
    shards.write_shards([("a", scene), ("b", scene)], tmp_path / "whole")
    whole = (tmp_path / "whole" / "shard-000000.tar").read_bytes()
    codes: list[int] = []
    for number, content in enumerate(damaged(whole, "check")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.tar").write_bytes(content)
        codes.append(main(["check", str(folder), "--workers", "1"]))
    assert set(codes) == {0, 1} or set(codes) == {1}
    assert "cannot be read" in capsys.readouterr().err
    shutil.rmtree(tmp_path)
