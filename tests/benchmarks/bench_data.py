"""Samples per second of the commands of anystory_core.data, beside a plain read of the same files.

    python3 dev.py bench data [--count 400] [--workers 2]

CPU seconds of all processes are given as well, since they do not depend on what else runs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))

from public import films, media

ROOT = Path(__file__).resolve().parents[2]
SIZE = (640, 480)  # of COCO's pictures
OBJECTS = 7  # a picture, as in COCO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, options.count)
        workers = options.workers
        print(f"{options.count} JPEG files of {SIZE[0]}x{SIZE[1]}, {OBJECTS} polygons each")
        files = sorted((folder / "images").iterdir())
        line("plain read", options.count, *timed(lambda: [file.read_bytes() for file in files]))
        line("decode and encode alone", options.count, *timed(lambda: alone(files, workers)))
        coco = ["coco", "--annotations", folder / "instances.json", "--images", folder / "images"]
        run("coco", options.count, [*coco, "--per-shard", 100, "--out", folder / "coco"], workers)
        run("check", options.count, ["check", folder / "coco"], workers)
        write_parquet(folder, files)
        pairs = ["parquet", folder / "pairs.parquet", "--reference", "a", "--target", "b"]
        count = options.count // 2
        run("parquet", count, [*pairs, "--per-shard", 100, "--out", folder / "parquet"], workers)
        write_fashion(folder, files[:100])
        run(
            "deepfashion2",
            50,
            ["deepfashion2", folder / "fashion", "--out", folder / "df"],
            workers,
        )
        models = folder / "models"
        models.mkdir()
        for number in range(20):
            (models / f"{number}.glb").write_bytes((media() / "models3d" / "Duck.glb").read_bytes())
        run(
            "views: 7 of 768x768",
            20,
            ["views", models, "--per-shard", 5, "--out", folder / "v"],
            workers,
        )
        clips = folder / "films"
        clips.mkdir()
        for number in range(8):
            (clips / f"{number}.mp4").write_bytes((films() / "bikes.mp4").read_bytes())
        line("plain decoding of the films: shots", 48, *timed(lambda: decode(clips)))
        run(
            "video: shots",
            48,
            ["video", clips, "--per-shard", 2, "--out", folder / "film"],
            workers,
        )


def write_pictures(folder: Path, count: int) -> None:
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    originals = [
        Image.open(media() / "images" / name).convert("RGB").resize((960, 720))
        for name in ("cheetah.jpg", "lion.jpg", "tower.jpg", "groot.jpeg")
    ]
    images, annotations = [], []
    for number in range(count):
        x, y = rng.integers(0, 320), rng.integers(0, 240)
        picture = originals[number % 4].crop((x, y, x + SIZE[0], y + SIZE[1]))
        picture.save(folder / "images" / f"{number:06d}.jpg", quality=90)
        size = {"width": SIZE[0], "height": SIZE[1]}
        images.append({"id": number, "file_name": f"{number:06d}.jpg", **size})
        for _ in range(OBJECTS):
            angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            centre = rng.uniform(100, 380, 2)
            points = centre + rng.uniform(40, 90) * np.stack((np.cos(angle), np.sin(angle)), 1)
            row = {"image_id": number, "category_id": 1, "segmentation": [points.ravel().tolist()]}
            annotations.append(row)
    table = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (folder / "instances.json").write_text(json.dumps(table))


def write_parquet(folder: Path, files: list[Path]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"a": one.read_bytes(), "b": other.read_bytes()}
        for one, other in zip(files[::2], files[1::2], strict=True)
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "pairs.parquet", row_group_size=100)


def write_fashion(folder: Path, files: list[Path]) -> None:
    for name in ("image", "annos"):
        (folder / "fashion" / name).mkdir(parents=True)
    box = [[100, 100, 300, 100, 300, 300, 100, 300]]
    for number, file in enumerate(files):
        (folder / "fashion" / "image" / f"{number:06d}.jpg").write_bytes(file.read_bytes())
        item = {"style": 1, "category_name": "skirt", "segmentation": box}
        side = "user" if number % 2 else "shop"
        table = {"source": side, "pair_id": number // 2, "item1": item}
        (folder / "fashion" / "annos" / f"{number:06d}.json").write_text(json.dumps(table))


def decode(folder: Path) -> None:
    import av

    for file in folder.iterdir():
        with av.open(str(file)) as film:
            for _ in film.decode(video=0):
                pass


def alone(files: list[Path], workers: int) -> None:
    """What no converter that looks at its pictures and writes masks can do without."""
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_decode_and_encode, files, chunksize=50))


def _decode_and_encode(file: Path) -> None:
    picture = Image.open(io.BytesIO(file.read_bytes()))
    picture.load()
    ys, xs = np.mgrid[: SIZE[1], : SIZE[0]]
    labels = ((xs // 100) % 2 * (ys // 100)).astype(np.uint8)
    Image.fromarray(labels).save(io.BytesIO(), "PNG", compress_level=1)


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process and of those it waited for)."""
    before, start = os.times(), time.monotonic()
    action()
    after = os.times()
    return time.monotonic() - start, sum(after[:4]) - sum(before[:4])


def run(name: str, count: int, arguments: list[object], workers: int) -> None:
    whole = [*arguments, "--workers", workers]
    line(name, count, *timed(lambda: call(whole)))


def call(arguments: Sequence[object]) -> None:
    """One command of anystory_core.data, to its end."""
    command = [sys.executable, "-m", "anystory_core.data", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def line(name: str, count: int, wall: float, processor: float) -> None:
    print(
        f"{name:36} {count / wall:9.1f} samples/s {1000 * processor / count:9.2f} CPU ms a sample",
        flush=True,
    )


if __name__ == "__main__":
    main()
