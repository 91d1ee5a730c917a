"""Masks and captions by models: the commands around them, with the real classes at toy sizes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import tiny
import torch
import torchvision
from PIL import Image
from public import media
from safetensors.torch import save_file

from anystory_core.data import edit, shards
from anystory_core.data.captioner import CaptionSettings, with_words
from anystory_core.data.check import check
from anystory_core.data.commands import masks as masks_command
from anystory_core.data.index import Index
from anystory_core.data.libraries import library
from anystory_core.data.schema import decode, read_words
from anystory_core.data.segmenters import Found, load_segmenter
from anystory_core.errors import DataError


def without_masks(count: int) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (key, {name: content for name, content in files.items() if not name.startswith("masks")})
        for key, files in tiny.scenes(count)
    ]


def bright(pictures: Any) -> list[list[Found]]:
    """A segmenter that finds what is brighter than the toy world's ground, colour by colour."""
    found: list[list[Found]] = []
    for picture in pictures:
        array = np.asarray(picture).astype(int)
        colours = np.unique(array.reshape(-1, 3), axis=0)
        masks = [(array == colour).all(-1) for colour in colours]
        ground = (colours < 60).all(-1)
        ones = [Found(m, f"shape {i}", 1.0) for i, m in enumerate(masks) if not ground[i]]
        found.append(ones)
    return found


@pytest.fixture
def by_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_command, "load_segmenter", lambda *_, **__: bright)


def test_masks_in_place_to_a_trained_step(
    tmp_path: Path, data: Any, train: Any, by_colour: None
) -> None:
    folder = tmp_path / "scenes"
    shards.write_shards(without_masks(6), folder, per_shard=4)
    before = {entry.key: entry.files["image.png"].read() for entry in Index.of([str(folder)])}
    assert "6 samples (6 scene) of 6 items" in data("masks", folder, "--model", "by colour")
    index = Index.of([str(folder)])
    wanted = dict(tiny.scenes(6))
    for entry in index:
        assert entry.files["image.png"].read() == before[entry.key]
        labels = np.array(Image.open(io.BytesIO(entry.files["masks.png"].read())))
        true = np.array(Image.open(io.BytesIO(wanted[entry.name]["masks.png"])))
        assert np.array_equal(labels > 0, true > 0)
        assert len(read_words(entry)) == len(decode(entry).masks)
    assert check([str(folder)])[1]
    steps = json.loads((folder / "manifest.json").read_text())["steps"]
    assert [step["command"] for step in steps] == ["masks"]
    train(folder, "router")


def test_masks_of_pairs_and_groups(tmp_path: Path, data: Any, by_colour: None) -> None:
    """One subject each; what has a mask, or alpha, keeps it."""
    files = dict(tiny.pairs(1)[0][1])
    reference_mask = files["reference_mask.png"]
    clear = np.zeros((64, 64, 4), np.uint8)
    clear[:32] = 255
    plain = {n: c for n, c in files.items() if "mask" not in n}
    group = {
        "caption.txt": b"", "view0.png": files["target.png"], "view1.png": shards.png(clear)
    }  # fmt: skip
    samples = [("a", files), ("b", plain), ("c", group), ("d", plain | {"target.png": b"none"})]
    shards.write_shards(samples, tmp_path / "in")
    said = data("masks", tmp_path / "in", "--model", "x", "--out", tmp_path / "out", "--batch", 4)
    assert "damaged, left as it was: 1" in said and "d: target.png is not a picture" in said
    a, b, c, d = Index.of([str(tmp_path / "out")])
    assert a.files["reference_mask.png"].read() == reference_mask
    assert "target_mask.png" in a.files and {"reference_mask.png", "target_mask.png"} <= set(
        b.files
    )
    assert {"view0_mask.png"} == {name for name in c.files if "mask" in name}
    assert d.files["target.png"].read() == b"none"


def test_masks_of_a_folder_of_pictures(tmp_path: Path, data: Any, by_colour: None) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for key, files in tiny.scenes(3):
        (folder / f"{key}.png").write_bytes(files["image.png"])
    code, _, error = data.ended("masks", folder, "--model", "x")
    assert code == 1 and "no shards that could be changed in place" in error
    assert "3 samples (3 scene)" in data("masks", folder, "--model", "x", "--out", tmp_path / "out")
    shards.write_shards([("a", tiny.scenes(1)[0][1] | {"json": b"{}"})], tmp_path / "stray")
    assert "1 samples" in data("masks", tmp_path / "stray", "--model", "x")
    assert "json" in Index.of([str(tmp_path / "stray")])[0].files  # nothing is lost


def test_what_is_kept_of_what_is_found() -> None:
    """Nothing that is too small, unwanted, or hidden under what is painted later."""

    def box(top: int, left: int, side: int) -> np.ndarray:
        mask = np.zeros((100, 100), np.bool_)
        mask[top : top + side, left : left + side] = True
        return mask

    masks = masks_command.Masks("", ("dog",), 0.5, 0.005, 1, False)
    whole, part, speck = box(0, 0, 60), box(10, 10, 20), box(90, 90, 5)
    found = [Found(whole, "dog", 1), Found(part, "dog", 1), Found(speck, "dog", 1)]
    found += [Found(box(70, 70, 20), "cat", 1), Found(part.copy(), "dog", 1)]
    kept = masks._kept(found)
    assert [int(one.mask.sum()) for one in kept] == [400, 3600]
    assert masks_command._nearness(Found(box(40, 40, 20), "", 1)) > masks_command._nearness(
        Found(box(0, 0, 20), "", 1)
    )


def test_torchvisions_mask_r_cnn(tmp_path: Path) -> None:
    """Its own weights file, by both of its versions' names; untrained, it finds what it finds."""
    torch.manual_seed(0)
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    segment = load_segmenter(
        str(tmp_path / "weights.pth"), torch.device("cpu"), least_score=0.0, trust_code=False
    )
    picture = Image.open(media() / "images" / "lion.jpg").convert("RGB").resize((96, 64))
    (found,) = segment([picture])
    words = torchvision.models.detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    for one in found:
        assert one.mask.shape == (64, 96) and one.word in words and 0 <= one.score <= 1
    (tmp_path / "other.pth").write_bytes(b"no weights")
    with pytest.raises(DataError, match="no weights of torchvision's Mask R-CNN"):
        load_segmenter(
            str(tmp_path / "other.pth"), torch.device("cpu"), least_score=0, trust_code=False
        )


@pytest.mark.parametrize("kind", ["mask2former", "sam2"])
def test_segmenters_of_transformers(tmp_path: Path, kind: str) -> None:
    getattr(models, f"write_{kind}")(tmp_path / kind)
    segment = load_segmenter(
        str(tmp_path / kind), torch.device("cpu"), least_score=0.0, trust_code=False
    )
    pictures = [
        Image.open(media() / "images" / name).convert("RGB").resize((96, 64))
        for name in ("lion.jpg", "cheetah.jpg")
    ]
    rows = segment(pictures)
    assert len(rows) == 2
    for one in [one for row in rows for one in row]:
        assert one.mask.shape == (64, 96) and one.mask.dtype == np.bool_
        assert one.word in ({"cat", "dog"} if kind == "mask2former" else {""})
    if kind == "mask2former":
        assert any(rows)


BIREFNET = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class Config(PretrainedConfig):
    model_type = "toy"


class Foreground(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, pixels):
        return [None, 100 * self.scale * pixels.mean(1, keepdim=True)]
"""


def test_code_in_a_models_folder_runs_only_when_asked(tmp_path: Path) -> None:
    """BiRefNet brings its own classes; this has its form: the last output is a map of logits."""
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "toy.py").write_text(BIREFNET)
    maps = {"AutoConfig": "toy.Config", "AutoModelForImageSegmentation": "toy.Foreground"}
    table = {"model_type": "toy", "architectures": ["Foreground"], "auto_map": maps}
    (folder / "config.json").write_text(json.dumps(table))
    save_file({"scale": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    cpu = torch.device("cpu")
    with pytest.raises(DataError, match="brings Python code of its own; .* --trust-code"):
        load_segmenter(str(folder), cpu, least_score=0.5, trust_code=False)
    segment = load_segmenter(str(folder), cpu, least_score=0.5, trust_code=True)
    half = np.zeros((40, 60, 3), np.uint8)
    half[:, 30:] = 255
    ((one,),) = segment([Image.fromarray(half)])
    assert np.array_equal(one.mask[:, :28], np.zeros((40, 28), bool)) and one.mask[:, 32:].all()
    with pytest.raises(DataError, match="neither a weights file nor a folder"):
        load_segmenter(str(tmp_path), cpu, least_score=0.5, trust_code=False)


def test_captions_in_place_to_a_trained_step(tmp_path: Path, data: Any, train: Any) -> None:
    models.write_qwen2_vl(tmp_path / "model")
    folder = tmp_path / "scenes"
    samples = [
        (key, {**files, **shards.words_json([f"disc {key}"])}) for key, files in tiny.scenes(5)
    ]
    shards.write_shards(samples, folder, per_shard=3)
    config = tmp_path / "captions.toml"
    config.write_text('prompt = "What is it?"\nmost_tokens = 12\n')
    where = ("captions", folder, "--model", tmp_path / "model", "--config", config)
    assert "5 samples (5 scene) of 5 items" in data(*where, "--batch", 2)
    written = [decode(entry).caption for entry in Index.of([str(folder)])]
    for (key, _), caption in zip(samples, written, strict=True):
        assert caption.endswith(f"disc {key}") and caption != samples[0][1]["caption.txt"].decode()
    (step,) = json.loads((folder / "manifest.json").read_text())["steps"]
    assert step["options"]["prompt"] == "What is it?" and step["finished"]
    train(folder, "router")
    config.write_text("colour = 1")
    code, _, error = data.ended(*where)
    assert code == 1 and "unknown ['colour']" in error
    code, _, error = data.ended("captions", folder, "--model", folder, "--out", tmp_path / "x")
    assert "no model that reads pictures and writes text" in error + str(code)


def test_captions_of_views_and_empty_ones(tmp_path: Path, data: Any) -> None:
    models.write_qwen2_vl(tmp_path / "model")
    pictures = [files["target.png"] for _, files in tiny.pairs(3)]
    views = {f"view{i}.png": picture for i, picture in enumerate(pictures)}
    samples = [("a", {"caption.txt": b"a cup", "view1_caption.txt": b"kept", **views})]
    shards.write_shards(samples, tmp_path / "in")
    data(
        "captions", tmp_path / "in", "--model", tmp_path / "model", "--only-empty",
        "--out", tmp_path / "out",
    )  # fmt: skip
    (entry,) = Index.of([str(tmp_path / "out")])
    assert {f"view{i}_caption.txt" for i in range(3)} <= set(entry.files)
    assert entry.files["view1_caption.txt"].read() == b"kept"
    assert entry.files["caption.txt"].read() == b"a cup"


def test_words_are_kept() -> None:
    assert with_words("A dog runs.", ["dog"]) == "A dog runs."
    assert with_words("An animal runs.", ["dog", "ball", "dog"]) == "An animal runs, dog, ball"
    assert with_words("", ["dog"]) == "dog"
    assert "{words}" in CaptionSettings().words


def test_a_missing_library_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no sample's fault: nothing is counted as damaged, the line that installs it is said."""
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(DataError, match=r"pip install pycocotools"):
        library("pycocotools.mask", "pycocotools")

    def change(entries: Any) -> Any:
        return library("pycocotools.mask", "pycocotools")

    shards.write_shards(tiny.scenes(1), tmp_path)
    with pytest.raises(DataError, match="pip install"):
        list(edit.in_batches(list(Index.of([str(tmp_path)])), 1, change))
