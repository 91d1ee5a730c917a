"""Groups from published films."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from public import films

from anystory_core.data.films import Cut, shots
from anystory_core.data.index import Index
from anystory_core.data.schema import decode


def test_from_a_film_to_a_trained_step(tmp_path: Path, data: Any, train: Any) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    shutil.copy(films() / "bikes.mp4", folder)
    (folder / "broken.mp4").write_bytes((films() / "bikes.mp4").read_bytes()[:40_000])
    (folder / "none.avi").write_bytes(b"no film")
    said = data("video", folder, "--apart", 0.3, "--caption", "a street", "--out", tmp_path / "out")
    assert "5 samples (5 group) of 3 items" in said and "left out, damaged: 2" in said
    assert "a shot without two frames to keep: 1" in said and "none.avi is no film" in said
    index = Index.of([str(tmp_path / "out")])
    assert [entry.key for entry in index] == [f"out/bikes-{i:04d}" for i in range(5)]
    first = index[0]
    assert {"view0.jpg", "view1.jpg", "caption.txt"} <= set(first.files)
    with av.open(str(films() / "bikes.mp4")) as film:
        frame = next(film.decode(video=0)).to_ndarray(format="rgb24")
    kept = np.array(Image.open(io.BytesIO(first.files["view0.jpg"].read())))
    assert kept.shape == frame.shape
    assert np.abs(kept.astype(int) - frame).mean() < 1.5  # of 255: JPEG at 95 of a sharp frame
    train(tmp_path / "out", "subject")


def test_frames_of_a_shot_lie_apart_and_within_it() -> None:
    film = str(films() / "bikes.mp4")
    found = list(shots(film, Cut(views=4, apart=0.2, cut=0.15, least_change=0.02)))
    assert [frames[0].number for frames in found] == [0, 30, 76, 137, 187, 242]  # seen by eye
    for frames, end in zip(found, [30, 76, 137, 187, 242, 250], strict=True):
        times = [frame.seconds for frame in frames]
        assert all(b - a > 0.2 - 1e-6 for a, b in zip(times, times[1:], strict=False))
        assert len(frames) <= 4 and frames[-1].number < end
        for i, one in enumerate(frames):
            for other in frames[:i]:
                assert np.abs(one.thumbnail - other.thumbnail).mean() >= 0.02
    still = list(shots(film, Cut(views=4, apart=0.2, cut=0.15, least_change=0.9)))
    assert [len(frames) for frames in still] == [1] * 6


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_films_are_upright(tmp_path: Path, degrees: int) -> None:
    """Phones film lying and note how to turn it: the matrix in the track's header."""
    upright = np.zeros((64, 32, 3), np.uint8)
    upright[:16] = (255, 0, 0)  # the sky
    turns = {90: 1, 180: 2, 270: 3}[degrees]  # a player turns to the right by as much
    lying = np.ascontiguousarray(np.rot90(upright, turns))
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.height, stream.width = lying.shape[:2]
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(lying, format="rgb24")))
        film.mux(stream.encode())
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd") + 4
    one, minus = (1 << 16).to_bytes(4, "big"), (-(1 << 16)).to_bytes(4, "big", signed=True)
    zero = bytes(4)
    a, b, c, d = {
        90: (zero, one, minus, zero), 180: (minus, zero, zero, minus), 270: (zero, minus, one, zero)
    }[degrees]  # fmt: skip
    content[header + 40 : header + 76] = (
        a + b + zero + c + d + zero + zero + zero + (1 << 30).to_bytes(4, "big")
    )
    path.write_bytes(content)
    ((frame, *_),) = shots(str(path), Cut(2, 0, 0.5, 0))
    assert frame.picture.shape == (64, 32, 3)
    assert frame.picture[:14, :, 0].mean() > 200 and frame.picture[18:, :, 0].mean() < 50


def test_given_masks(tmp_path: Path, data: Any) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    shutil.copy(films() / "bikes.mp4", folder)
    (first, *_) = shots(str(films() / "bikes.mp4"), Cut(5, 0.3, 0.15, 0.02))
    masks = tmp_path / "masks" / "bikes"
    masks.mkdir(parents=True)
    mask = np.zeros(first[0].picture.shape[:2], np.uint8)
    mask[50:200, 100:300] = 255
    for frame in first[:2]:
        Image.fromarray(mask).save(masks / f"{frame.number:06d}.png")
    where = ("--masks", tmp_path / "masks", "--apart", 0.3, "--lossless")
    said = data("video", folder, *where, "--out", tmp_path / "out")
    assert "1 samples" in said and "a shot without two frames to keep: 5" in said
    raw = decode(Index.of([str(tmp_path / "out")])[0])
    assert raw.reference_mask is not None and float(raw.reference_mask.sum()) == 150 * 200
    assert len(raw.masks) == 1
    Image.fromarray(mask[:50]).save(masks / "000000.png")
    said = data.ended("video", folder, *where, "--out", tmp_path / "wrong")[1]
    assert "000000.png is not of the frame's size" in said
    code, _, error = data.ended("video", tmp_path / "masks", "--out", tmp_path / "x")
    assert code == 1 and "holds no films" in error
