"""Groups from renders and from published 3D models."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from public import media

from anystory_core.data.check import check
from anystory_core.data.index import Index
from anystory_core.data.render import Look, render
from anystory_core.data.schema import decode


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("Duck.glb", "Fox.gltf", "face.obj"):
        shutil.copy(media() / "models3d" / name, folder)
    return folder


def views(entry: Any, count: int) -> list[np.ndarray]:
    return [
        np.array(Image.open(io.BytesIO(entry.files[f"view{i}.png"].read()))) for i in range(count)
    ]


def test_from_models_to_a_trained_step(models: Path, data: Any, train: Any) -> None:
    (models / "broken.glb").write_bytes((models / "Duck.glb").read_bytes()[:5000])
    (models / "empty.gltf").write_text('{"asset": {"version": "2.0"}}')
    out = models.parent / "out"
    said = data("views", models, "--size", 128, "--out", out)
    assert "3 samples (3 group) of 5 items" in said and "left out, damaged: 2" in said
    assert "broken.glb is no whole GLB file" in said and "empty.gltf holds no meshes" in said
    for entry in Index.of([str(out)]):
        drawn = views(entry, 7)
        for view in drawn:
            assert view.shape == (128, 128, 4)
            inside = view[..., 3] > 127
            assert 0.02 < inside.mean() < 0.9, entry.key
            assert not inside[[0, -1]].any() and not inside[:, [0, -1]].any()  # nothing cut off
        differ = [np.abs(drawn[0].astype(int) - other.astype(int)).mean() for other in drawn[1:]]
        assert min(differ) > 1
    duck = views(Index.of([str(out)])[0], 7)[0]
    colour = duck[duck[..., 3] == 255][:, :3].mean(axis=0)
    assert colour[0] > 80 and colour[0] > 1.5 * colour[2]  # its texture is yellow
    assert check([str(out)])[1]
    train(out, "subject", subject={"inside": 1.0})


def test_edges_are_as_bright_as_what_they_border() -> None:
    """A half covered pixel has the colour of the model, not half of it: on white it is no dark
    line."""
    (view, _) = render(str(media() / "models3d" / "Duck.glb"), Look(2, 128, 20, "even"))
    half = (view[..., 3] > 30) & (view[..., 3] < 225)
    assert half.sum() > 50
    inner = view[view[..., 3] == 255][:, :3].mean()
    assert view[half][:, :3].mean() > 0.6 * inner


def test_light_and_background(models: Path, data: Any) -> None:
    for name in ("Fox.gltf", "face.obj"):
        (models / name).unlink()
    said: dict[str, np.ndarray] = {}
    for light in ("studio", "even", "side"):
        out = models.parent / light
        data(
            "views", models, "--views", 2, "--size", 64, "--light", light,
            "--background", "#ff0000", "--caption", "a toy {name}", "--out", out,
        )  # fmt: skip
        raw = decode(Index.of([str(out)])[0])
        assert raw.caption == "a toy Duck"
        assert raw.reference is not None and raw.reference_mask is not None
        assert raw.reference[0, 0].tolist() == [1, 0, 0] and raw.reference_mask[0, 0] == 0
        assert float(raw.reference_mask.mean()) > 0.05
        said[light] = raw.target.numpy()
    assert np.abs(said["studio"] - said["even"]).mean() > 0.005
    assert np.abs(said["side"] - said["even"]).mean() > 0.005
    code, _, error = data.ended("views", models, "--background", "none", "--out", models / "x")
    assert code == 1 and "--background" in error


def test_folders_of_renders(tmp_path: Path, data: Any) -> None:
    """Their files go into the shard as they are."""
    picture = np.zeros((64, 64, 4), np.uint8)
    for thing in ("red_cup", "blue_cup"):
        (tmp_path / "things" / thing).mkdir(parents=True)
        for number in range(3):
            picture[8 * number : 40, 10:50] = (255, 0, number, 255)
            Image.fromarray(picture).save(tmp_path / "things" / thing / f"{number}.png")
    (tmp_path / "things" / "single").mkdir()
    Image.fromarray(picture).save(tmp_path / "things" / "single" / "0.png")
    (tmp_path / "things" / "blue_cup" / "1.png").write_bytes(b"no picture")
    said = data("views", tmp_path / "things", "--out", tmp_path / "out")
    assert "1 samples (1 group) of 2 items" in said and "blue_cup/1.png is not a picture" in said
    (entry,) = Index.of([str(tmp_path / "out")])
    assert decode(entry).caption == "red cup"
    original = (tmp_path / "things" / "red_cup" / "2.png").read_bytes()
    assert entry.files["view2.png"].read() == original
    code, _, error = data.ended("views", tmp_path / "out", "--out", tmp_path / "x")
    assert code == 1 and "neither folders of pictures nor .glb" in error
