"""Configurations and bases that cannot work: each its own sentence."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from anystory_core.bases.sdxl.prediction import Prediction
from anystory_core.data.__main__ import main as data_main
from anystory_core.errors import AnyStoryError, ConfigError
from anystory_core.training import initial
from anystory_core.training.__main__ import main
from anystory_core.training.config import load_config
from anystory_core.training.hosts.frozen import load_frozen
from anystory_core.training.loop import Trainer
from anystory_core.training.settings import BaseSettings, seconds
from anystory_core.weights.checkpoint import save_model
from anystory_core.weights.model import build_model

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
    "no list": (
        GOOD.replace('["data"]', '"data"') + "[subject]\n",
        "data.paths: got 'data', expected a list",
    ),
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


def test_files_to_go_on_from(subject_file: Path, world: Any, tmp_path: Path) -> None:
    """A file without the parts, or of other sizes, is refused by the name of the field."""
    model = build_model(tiny.config(), ("subject_encoder", "clip_projections"))
    with pytest.raises(ConfigError, match=r"router\.start_file: .* lacks \['routers'"):
        initial.copy_parts(
            build_model(tiny.config(), ("routers",)), str(subject_file), "router.start_file"
        )
    deeper = replace(tiny.config().subject_qformer, layers=5)
    larger = replace(tiny.config(), subject_qformer=deeper)
    with pytest.raises(ConfigError, match="this run's: subject_qformer.layers = 1, not 5$"):
        initial.copy_parts(
            build_model(larger, ("subject_encoder",)), str(subject_file), "subject.start_file"
        )
    initial.copy_parts(model, str(subject_file), "subject.start_file")


def test_stage_2_refuses_a_file_that_does_not_fit(world: Any, tmp_path: Path) -> None:
    own = tiny.config()
    reading = replace(own, reference=replace(own.reference, cross_attention=True))
    model = build_model(reading, ("reference_net", "reference_projections"))
    file = tmp_path / "original.safetensors"
    save_model(file, model, reading)
    path = tiny.run_toml(
        tmp_path, world.base, world.scenes, "router", steps=1, router={"subject_file": str(file)}
    )
    with pytest.raises(ConfigError, match=r"router\.subject_file: its ReferenceNet reads text"):
        Trainer(load_config(path)).run()
    other = replace(own, reference=replace(own.reference, size=2 * own.reference.size))
    tiny.write_weights(file, parts=("reference_net", "reference_projections"), model=other)
    with pytest.raises(
        ConfigError, match=r"router\.subject_file: made for .* reference\.size = 128, not 64\."
    ):
        Trainer(load_config(path)).run()


def test_bases(world: Any, tmp_path: Path) -> None:
    model = str(world.base / "config.json")
    with pytest.raises(ConfigError, match="does not exist"):
        load_frozen(
            BaseSettings(path=str(tmp_path / "no"), clip_vision=str(world.base / "image_encoder"))
        )
    with pytest.raises(ConfigError, match="clip_vision"):
        load_frozen(BaseSettings(path=str(tmp_path)))
    with pytest.raises(ConfigError, match="no unet"):
        load_frozen(BaseSettings(path=str(tmp_path), clip_vision=str(world.base / "image_encoder")))
    with pytest.raises(AnyStoryError, match="block_out_channels"):
        load_frozen(BaseSettings(path=str(world.base), model="sdxl"))
    with pytest.raises(ConfigError, match=r"base\.model"):
        load_frozen(BaseSettings(path=str(world.base), model="sd15"))
    assert load_frozen(BaseSettings(path=str(world.base), model=model)).config == tiny.config()


def _without_first(path: Path) -> None:
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path, metadata={"format": "pt"})


UNET, CLIP = "unet/diffusion_pytorch_model.safetensors", "image_encoder/model.safetensors"
DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    (UNET, Path.unlink, r"base\.path: .*unet holds no diffusion_pytorch_model\.safetensors"),
    (UNET, lambda p: p.write_bytes(b"x" * 100), r"base\.path: .*unet cannot be read"),
    (UNET, _without_first, r"base\.path: .*unet lacks 1 tensors, such as"),
    ("vae/config.json", lambda p: p.write_text("{"), r"base\.path: .*vae/config\.json cannot"),
    ("vae/config.json", lambda p: p.write_text("[]"), "holds no table"),
    ("vae/config.json", lambda p: p.write_text("{}"), "names a class that is not known"),
    ("text_encoder/model.safetensors", Path.unlink, r"base\.path: .*text_encoder holds no model"),
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
        load_frozen(BaseSettings(path=str(base), model=str(base / "config.json")))


def test_what_a_base_predicts(world: Any, tmp_path: Path) -> None:
    base = shutil.copytree(world.base, tmp_path / "base")
    settings = BaseSettings(path=str(base), model=str(base / "config.json"))
    assert load_frozen(settings).prediction == Prediction("epsilon")
    tiny.write_scheduler(base, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert load_frozen(settings).prediction == Prediction("v", zero_snr=True)
    tiny.write_scheduler(base, prediction_type="sample")
    with pytest.raises(AnyStoryError, match=r"base\.path: base predicts neither .*sample"):
        load_frozen(settings)
    shutil.rmtree(base / "scheduler")
    with pytest.raises(ConfigError, match=r"no scheduler.*base\.prediction to 'epsilon'"):
        load_frozen(settings)
    assert load_frozen(replace(settings, prediction="v")).prediction == Prediction("v")


def test_a_folder_of_a_variant(world: Any, tmp_path: Path) -> None:
    """As fp16 folders are published, one of their networks in pieces."""
    base = shutil.copytree(world.base, tmp_path / "base")
    for name, stem in (
        ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"), ("image_encoder", "model"),
    ):  # fmt: skip
        file = base / name / f"{stem}.safetensors"
        half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        file.unlink()
        if name == "unet":
            parts = {f"{stem}.fp16-0000{i + 1}-of-00002.safetensors": {} for i in range(2)}
            for i, (key, tensor) in enumerate(half.items()):
                list(parts.values())[i % 2][key] = tensor
            table = {key: part for part, tensors in parts.items() for key in tensors}
            index = {"metadata": {}, "weight_map": table}
            (base / name / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps(index))
        else:
            parts = {f"{stem}.fp16.safetensors": half}
        for part, tensors in parts.items():
            save_file(tensors, base / name / part, metadata={"format": "pt"})
    model = str(base / "config.json")
    found = load_frozen(BaseSettings(path=str(base), model=model)).unet.state_dict()
    whole = load_frozen(BaseSettings(path=str(world.base), model=model)).unet.state_dict()
    assert all(torch.equal(x.half(), found[name].half()) for name, x in whole.items())
    (base / "unet" / "diffusion_pytorch_model.fp16-00002-of-00002.safetensors").unlink()
    with pytest.raises(AnyStoryError, match="names .*00002-of-00002.*not in it"):
        load_frozen(BaseSettings(path=str(base), model=model))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--help"], "RUN.toml"), (["-h"], "RUN.toml"), ([], "RUN.toml")):
        assert main(arguments) == (0 if arguments else 2)
        said = capsys.readouterr()
        assert words in (said.out if arguments else said.err)
    for command, words in (("merge", "--dtype"), ("export", "--step")):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and words in capsys.readouterr().out


def test_text_encoders_of_either_transformers(world: Any, tmp_path: Path) -> None:
    """Older versions saved them with `text_model.` before every name."""
    base = shutil.copytree(world.base, tmp_path / "base")
    settings = BaseSettings(path=str(base), model=str(base / "config.json"))
    states, pooled = load_frozen(settings).text(["a shape"])
    path = base / "text_encoder" / "model.safetensors"
    bare = {k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    save_file({f"text_model.{k}": v for k, v in bare.items()}, path, metadata={"format": "pt"})
    again = load_frozen(settings).text(["a shape"])
    assert torch.equal(again[0], states) and torch.equal(again[1], pooled)


def test_the_commands_say_one_line(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.run_toml(
        tmp_path, world.base, world.scenes, "router", steps=1, router={"subject_file": "no"}
    )
    absent = str(tmp_path / "absent.toml")
    for command, arguments, words in (
        (main, [str(path)], "error: no: cannot be opened (No such file or directory)"),
        (main, [absent], "cannot be opened"),
        (data_main, ["check", str(tmp_path / "nothing")], "neither a folder"),
    ):
        assert command(arguments) == 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert words in line
    done = subprocess.run(
        [sys.executable, "-m", "anystory_core.training", absent],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: ")


def test_an_unwritable_folder(world: Any, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    path = tiny.run_toml(
        tmp_path, world.base, world.pairs, "subject", steps=1, run={"folder": str(taken)}
    )
    with pytest.raises(AnyStoryError, match="cannot be written"):
        Trainer(load_config(path))
    assert json.loads((world.base / "config.json").read_text())["name"] == "tiny"
