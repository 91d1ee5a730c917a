"""Configurations, data and bases that cannot work: each its own sentence."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from anystory_core.build import build_model
from anystory_core.errors import AnyStoryError, ConfigError
from anystory_core.training import initial, shards
from anystory_core.training.bases import load_base
from anystory_core.training.batches import Batch
from anystory_core.training.check import check
from anystory_core.training.config import BaseSettings, load_config, seconds
from anystory_core.training.data import BadSamples, DataError, Index, decode
from anystory_core.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


GOOD = """
[base]
path = "base"
[data]
paths = ["data"]
[run]
folder = "out"
steps = 1
"""

CONFIGS = {
    "not TOML": ("[base", "not TOML"),
    "unknown key": (GOOD + "[subject]\ncolour = 1\n", "unknown ['colour']"),
    "unknown table": (GOOD + "[subject]\n[speed]\n", "unknown ['speed']"),
    "no stage": (GOOD, "which stage"),
    "two stages": (GOOD + '[subject]\n[router]\nsubject_file = "a"\n', "which stage"),
    "missing key": (GOOD.replace("steps = 1", "") + "[subject]\n", "['steps'] missing"),
    "wrong type": (GOOD.replace("steps = 1", 'steps = "many"') + "[subject]\n", "expected int"),
    "zero steps": (GOOD.replace("steps = 1", "steps = 0") + "[subject]\n", "run.steps"),
    "no unit": (
        GOOD.replace("steps = 1", 'steps = 1\ncheckpoint_every = "10"') + "[subject]\n",
        "a number with s, min or h",
    ),
    "precision": (
        GOOD.replace("steps = 1", 'steps = 1\nprecision = "fp8"') + "[subject]\n",
        "expected one of",
    ),
    "both branches off": (GOOD + "[subject]\nclip = false\nreference = false\n", "both off"),
    "probability": (GOOD + "[subject]\n[augment]\nflip = 2.0\n", "augment.flip"),
    "two points": (
        GOOD.replace("steps = 1", 'steps = 1\ncheckpoint_every = "1.2.3 min"') + "[subject]\n",
        "run.checkpoint_every: got '1.2.3 min', expected a number with s, min or h",
    ),
}
OUT_OF_RANGE = [
    ("data", "resolution", 0, "8 or more"),
    ("data", "max_subjects", 0, "1 or more"),
    ("data", "workers", -1, "0 or more"),
    ("augment", "most_padding", -3.0, "0 or more"),
    ("augment", "least_kept", 1.5, "0 to 1"),
    ("optimiser", "learning_rate", -1.0, "more than 0"),
    ("optimiser", "beta1", 1.0, "0 or more, less than 1"),
    ("optimiser", "ema", 1.0, "0 or more, less than 1"),
    ("run", "sheet_steps", 0, "1 or more"),
    ("run", "sheet_every", -1, "0 or more"),
    ("run", "seed", -1, "0 or more"),
    ("subject", "drop_clip", 2.0, "0 to 1"),
    ("subject", "drop_text", -0.1, "0 to 1"),
]


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name: str, tmp_path: Path) -> None:
    text, words = CONFIGS[name]
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(("table", "name", "value", "expected"), OUT_OF_RANGE)
def test_values_out_of_range(
    table: str, name: str, value: float, expected: str, tmp_path: Path
) -> None:
    text = GOOD + "[subject]\n"
    line = f"[{table}]\n{name} = {value}\n"
    text = text.replace(f"[{table}]\n", line) if f"[{table}]" in text else text + line
    words = f"{table}.{name}: got {value}, expected {expected}"
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(write(tmp_path, text))


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD + "[subject]\n"))
    assert config.run.folder == str(tmp_path / "out") and config.base.path == str(tmp_path / "base")
    assert seconds("1.5 min") == 90 and seconds("2h") == 7200
    with pytest.raises(ConfigError, match="cannot be opened"):
        load_config(tmp_path / "absent.toml")


@pytest.mark.parametrize("name", ["paper_subject", "paper_router"])
def test_the_papers_configurations_are_valid(name: str) -> None:
    path = ROOT / "anystory_core" / "training" / "configs" / f"{name}.toml"
    config = load_config(path)
    assert config.optimiser.learning_rate == 1e-4 and config.run.batch * 8 == 64


def test_files_to_go_on_from(subject_run: Any, world: Any, tmp_path: Path) -> None:
    """A file without the parts, or of other sizes, is refused by the name of the field."""
    model = build_model(tiny.config(), ("subject_encoder", "clip_projections"))
    with pytest.raises(ConfigError, match=r"router\.start_file: .* lacks \['routers'"):
        initial.copy_parts(
            build_model(tiny.config(), ("routers",)), str(subject_run.file), "router.start_file"
        )
    deeper = replace(tiny.config().subject_qformer, layers=5)
    larger = replace(tiny.config(), subject_qformer=deeper)
    with pytest.raises(ConfigError, match="in other sizes"):
        initial.copy_parts(
            build_model(larger, ("subject_encoder",)), str(subject_run.file), "subject.start_file"
        )
    initial.copy_parts(model, str(subject_run.file), "subject.start_file")


def test_bases(world: Any, tmp_path: Path) -> None:
    model = str(world.base / "config.json")
    with pytest.raises(ConfigError, match="does not exist"):
        load_base(
            BaseSettings(path=str(tmp_path / "no"), clip_vision=str(world.base / "image_encoder"))
        )
    with pytest.raises(ConfigError, match="clip_vision"):
        load_base(BaseSettings(path=str(tmp_path)))
    with pytest.raises(ConfigError, match="no unet"):
        load_base(BaseSettings(path=str(tmp_path), clip_vision=str(world.base / "image_encoder")))
    with pytest.raises(AnyStoryError, match="block_out_channels"):
        load_base(BaseSettings(path=str(world.base), model="sdxl"))
    with pytest.raises(ConfigError, match=r"base\.model"):
        load_base(BaseSettings(path=str(world.base), model="sd15"))
    assert load_base(BaseSettings(path=str(world.base), model=model)).config == tiny.config()


def _without_first(path: Path) -> None:
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path, metadata={"format": "pt"})


UNET, CLIP = "unet/diffusion_pytorch_model.safetensors", "image_encoder/model.safetensors"
DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    (UNET, Path.unlink, r"base\.path: .*unet cannot be read"),
    (UNET, lambda p: p.write_bytes(b"x" * 100), r"base\.path: .*unet cannot be read"),
    (UNET, _without_first, r"base\.path: .*unet lacks 1 tensors, such as"),
    ("vae/config.json", lambda p: p.write_text("{"), r"base\.path: .*vae/config\.json cannot"),
    ("vae/config.json", lambda p: p.write_text("[]"), "holds no table"),
    ("vae/config.json", lambda p: p.write_text("{}"), "names a class that is not known"),
    ("text_encoder/model.safetensors", Path.unlink, r"base\.path: .*text_encoder cannot be read"),
    (CLIP, lambda p: p.write_bytes(b""), r"base\.clip_vision: .*image_encoder cannot be read"),
    (CLIP, _without_first, r"base\.clip_vision: .*image_encoder lacks 1 tensors"),
]


@pytest.mark.parametrize(("file", "damage", "words"), DAMAGES)
def test_damaged_bases(
    file: str, damage: Callable[[Path], object], words: str, world: Any, tmp_path: Path
) -> None:
    """Each a sentence with the file's place, and never random weights in place of missing ones."""
    base = shutil.copytree(world.base, tmp_path / "base")
    damage(base / file)
    with pytest.raises(ConfigError, match=words):
        load_base(BaseSettings(path=str(base), model=str(base / "config.json")))


def test_text_encoders_of_either_transformers(world: Any, tmp_path: Path) -> None:
    """Older versions saved them with `text_model.` before every name."""
    base = shutil.copytree(world.base, tmp_path / "base")
    settings = BaseSettings(path=str(base), model=str(base / "config.json"))
    states, pooled = load_base(settings).text(["a shape"])
    path = base / "text_encoder" / "model.safetensors"
    bare = {k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    save_file({f"text_model.{k}": v for k, v in bare.items()}, path, metadata={"format": "pt"})
    again = load_base(settings).text(["a shape"])
    assert torch.equal(again[0], states) and torch.equal(again[1], pooled)


def test_data_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder nor"):
        Index.of((str(tmp_path / "no"),))
    with pytest.raises(DataError, match="holds no samples"):
        Index.of((str(tmp_path),))
    (tmp_path / "shard.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match="cannot be read"):
        Index.of((str(tmp_path),))


def test_an_empty_shard(tmp_path: Path) -> None:
    shards.write_shards([], tmp_path)
    (tmp_path / "shard-000000.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(DataError, match="holds no samples"):
        Index.of((str(tmp_path),))


def test_shards_and_folders_hold_the_same(tmp_path: Path) -> None:
    samples = tiny.pairs(3) + tiny.scenes(3)
    shards.write_shards(samples, tmp_path / "shards", per_shard=2)
    shards.write_folder(samples, tmp_path / "folder")
    packed, loose = (Index.of((str(tmp_path / n),)) for n in ("shards", "folder"))
    assert len(packed) == len(loose) == 6
    for a, b in zip(packed.entries, loose.entries, strict=True):
        assert a.kind == b.kind
        one, two = decode(a), decode(b)
        assert one.caption == two.caption and bool((one.target == two.target).all())
        assert one.masks.shape == two.masks.shape and bool((one.masks == two.masks).all())


def test_the_checker_names_bad_samples(tmp_path: Path) -> None:
    shards.write_folder(tiny.pairs(3) + tiny.scenes(2), tmp_path)
    assert check([str(tmp_path)])[1]
    (tmp_path / "pair0001.target.png").write_bytes(b"no picture")
    (tmp_path / "scene0000.caption.txt").unlink()
    report, good = check([str(tmp_path)])
    assert not good and "corrupt: 2" in report and "pair: 2" in report and "64x64: 3" in report
    assert "pair0001: target.png is not a picture" in report and "scene0000: has" in report


def test_inside_needs_the_place_of_the_subject(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs with a mask of the target train; of one without, the run says what it needs, and of
    one whose mask has another size, which."""
    data = tmp_path / "data"
    whole = np.zeros((64, 64), np.bool_)
    whole[:32] = True
    masks = [shards.png(whole.astype(np.uint8) * 255)] * 6 + [
        shards.png(np.zeros((9, 9), np.uint8))
    ]
    samples = tiny.pairs(8)
    for (_, files), mask in zip(samples, masks, strict=False):
        files["target_mask.png"] = mask
    shards.write_folder(samples, data)
    path = tiny.run_toml(tmp_path / "run", world.base, data, "subject", steps=2)
    path.write_text(path.read_text().replace("[subject]", "[subject]\ninside = 3.0"))
    trainer = Trainer(load_config(path))
    assert trainer.stage.inside == 3.0
    batch = Batch.of([trainer.dataset[0]])
    assert batch.masks.shape[1] == 1 and 0.4 < float(batch.masks.mean()) < 0.6
    trainer.run()
    said = capsys.readouterr().err
    assert "pair0006: target_mask.png is (9, 9), the picture (64, 64)" in said
    assert "pair0007: no target_mask.png, which subject.inside = 3 needs" in said


def test_masks_in_palette_files(tmp_path: Path) -> None:
    """Black and white may be the numbers 0 and 1 of a palette; only masks.png means the numbers."""
    half = np.zeros((64, 64), np.uint8)
    half[:32] = 1
    image = Image.fromarray(half, "P")
    image.putpalette((0, 0, 0, 255, 255, 255))
    file = io.BytesIO()
    image.save(file, "PNG")
    samples = [*tiny.pairs(1), *tiny.scenes(1)]
    for (_, files), names in zip(
        samples, (("target_mask.png", "reference_mask.png"), ("masks.png",)), strict=True
    ):
        files.update(dict.fromkeys(names, file.getvalue()))
    shards.write_folder(samples, tmp_path)
    pair, scene = (decode(entry) for entry in Index.of((str(tmp_path),)).entries)
    for mask in (pair.masks[0], pair.reference_mask, scene.masks[0]):
        assert mask is not None
        assert torch.equal(mask, torch.from_numpy(half).float())


def test_corrupt_samples_are_replaced_counted_and_named(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shards.write_folder(tiny.pairs(8), data)
    (data / "pair0003.target.png").write_bytes(b"no picture")
    path = tiny.run_toml(tmp_path / "run", world.base, data, "subject", steps=2)
    trainer = Trainer(load_config(path))
    trainer.run()
    assert trainer.bad.read >= 8 and any("pair0003" in text for text in trainer.bad.bad)
    said = capsys.readouterr().err
    assert said.count("replaced by the next: data/pair0003: target.png is not a picture") == 1
    assert f"1 of {trainer.bad.read} samples read were corrupt: ['data/pair0003']" in said


def test_too_many_corrupt_samples_stop_the_run() -> None:
    bad = BadSamples()
    for _ in range(1000):
        bad.note(None)
    for number in range(10):
        bad.note(DataError(f"sample{number}"))
    with pytest.raises(DataError, match="11 of 1011 samples are corrupt.*sample0"):
        bad.note(DataError("sample10"))


def test_the_command_says_one_line(world: Any, tmp_path: Path) -> None:
    path = tiny.run_toml(
        tmp_path, world.base, world.scenes, "router", steps=1, router={"subject_file": "no"}
    )
    for arguments, words in (
        ([str(path)], "error: no: cannot be opened (No such file or directory)"),
        ([str(tmp_path / "absent.toml")], "cannot be opened"),
        (["check", str(tmp_path / "nothing")], "neither a folder"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "anystory_core.training", *arguments],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
        assert done.returncode == 1 and words in line


def test_an_unwritable_folder(world: Any, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    path = tiny.run_toml(
        tmp_path, world.base, world.pairs, "subject", steps=1, run={"folder": str(taken)}
    )
    with pytest.raises(AnyStoryError, match="cannot be written"):
        Trainer(load_config(path))
    assert json.loads((world.base / "config.json").read_text())["name"] == "tiny"
