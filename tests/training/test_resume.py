"""A run that is killed and started again, and a run on two processes, are the run itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from gradients import save_gradients
from safetensors.torch import load_file, save_file

from anystory_core.data import shards
from anystory_core.errors import ConfigError
from anystory_core.training import checkpoints
from anystory_core.training.checkpoints import CheckpointFolderError
from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer, check_distribution
from anystory_core.weights.checkpoint import load_model

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
STEPS = 8
KILLED_AFTER = 4
PATIENCE = 1800  # seconds; twenty suffice on an idle machine


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def losses(folder: Path) -> list[dict[str, Any]]:
    path = folder / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def toml(folder: Path, world: Any) -> Path:
    return tiny.run_toml(
        folder, world.base, world.pairs, "subject", steps=STEPS,
        run={"checkpoint_every": "0.001 s", "log_every": 1, "batch": 2},
        optimiser={"ema": 0.9},
    )  # fmt: skip


def test_killed_and_resumed_to_the_last_bit(world: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anystory_core.training"]
    whole = toml(tmp_path / "whole", world)
    Trainer(load_config(whole)).run()

    killed = toml(tmp_path / "killed", world)
    process = subprocess.Popen(
        [*command, str(killed)], env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len(losses(killed.parent)) < KILLED_AFTER and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert KILLED_AFTER <= len(losses(killed.parent)) < STEPS
    subprocess.run([*command, str(killed)], env=environment(), check=True, capture_output=True)

    wanted = {line["step"]: line["loss"] for line in losses(whole.parent)}
    assert sorted(wanted) == list(range(1, STEPS + 1))
    for line in losses(killed.parent):  # steps done twice must agree both times
        assert line["loss"] == wanted[line["step"]]
    one, two = (
        load_file(f / "anystory_subject.safetensors") for f in (whole.parent, killed.parent)
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    kept = [p.name for p in (killed.parent / "checkpoints").iterdir()]
    assert sorted(kept) == [f"step-{n:08d}" for n in (STEPS - 2, STEPS - 1, STEPS)]


def test_two_processes_give_the_gradients_of_one(
    world: Any, subject_file: Path, tmp_path: Path
) -> None:
    """Of both stages. One of four scenes holds no subject, so one process has fewer."""
    scenes = tmp_path / "scenes"
    shards.write_folder(tiny.scenes(4, shapes=(1, 2, 0, 1)), scenes)
    stages: dict[str, Any] = {
        "subject": (world.pairs, {}),
        "router": (scenes, {"router": {"subject_file": str(subject_file)}}),
    }
    files: dict[tuple[str, int], list[Path]] = {}
    for stage, (data, tables) in stages.items():
        for count in (1, 2):
            folder = tmp_path / f"{stage}{count}"
            path = tiny.run_toml(
                folder, world.base, data, stage, steps=1, run={"batch": 4 // count}, **tables
            )
            files[stage, count] = [path, folder / "gradients.pt"]
    for stage in stages:
        save_gradients(*files[stage, 1])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        str(HERE / "gradients.py"), *(str(x) for stage in stages for x in files[stage, 2]),
    ]  # fmt: skip
    variables = {**environment(), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in stages:
        one, two = (torch.load(files[stage, count][1], weights_only=True) for count in (1, 2))
        assert one.keys() == two.keys() and one
        idle = {name for name, gradient in one.items() if not bool(gradient.any())}
        assert idle <= {"reference_net.label_emb.0.0.weight"}  # multiplies the zero label
        for name, gradient in one.items():
            # The mean of two halves against the mean of the whole: 8e-6 of a tensor's largest
            # measured. Biases that a norm takes off again have rounding alone, some 1e-11.
            bound = 5e-5 * float(gradient.abs().max()) + 1e-9
            assert float((gradient - two[name]).abs().max()) < bound, name


def test_two_processes_run_to_the_end(world: Any, tmp_path: Path) -> None:
    """Both begin in one folder, write checkpoints when the first one's clock says so, one of them
    exports, and neither fails on the way out. One process alone goes on from their checkpoint."""
    path = tiny.run_toml(
        tmp_path, world.base, world.pairs, "subject", steps=2,
        run={"batch": 2, "checkpoint_every": "0.001 s"}, optimiser={"ema": 0.9},
    )  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        str(HERE / "two_clocks.py"), str(path),
    ]  # fmt: skip
    variables = {**environment(), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("anystory_subject.safetensors")
    assert "reference_net" in load_model(file).parts
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000002"]
    alone = Trainer(load_config(path))
    assert alone.step == 2
    weights = load_file(tmp_path / "checkpoints" / "step-00000002" / "model.safetensors")
    trained = dict(alone.stage.named_parameters())
    assert weights.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights.items())


def test_resumed_in_other_micro_batches(world: Any, tmp_path: Path) -> None:
    """One batch of four or two of two: the same steps, also from an odd one on."""
    folder = tmp_path / "run"

    def train(steps: int, batch: int, accumulate: int) -> dict[str, torch.Tensor]:
        path = tiny.run_toml(
            folder, world.base, world.pairs, "subject", steps=steps,
            run={"batch": batch, "accumulate": accumulate}, optimiser={"schedule": "constant"},
        )  # fmt: skip
        return load_file(Trainer(load_config(path)).run())

    first = train(1, 4, 1)
    one = Path(shutil.copytree(folder / "checkpoints", tmp_path / "one"))
    straight = train(3, 4, 1)
    shutil.rmtree(folder)
    shutil.copytree(one, folder / "checkpoints")
    resumed = train(3, 2, 2)
    moved = torch.cat([(straight[n] - first[n]).flatten().abs() for n in first]).mean()
    apart = torch.cat([(straight[n] - resumed[n]).flatten().abs() for n in first]).mean()
    # Adam's steps have a size of their own, so rounding matters where gradients are tiny.
    assert apart < 0.05 * moved


def test_a_resumed_run_obeys_its_file(world: Any, tmp_path: Path) -> None:
    """What was changed in the file counts, not what the checkpoint remembers."""
    arguments = tmp_path, world.base, world.pairs, "subject"
    Trainer(load_config(tiny.run_toml(*arguments, steps=1))).run()
    changed = {"weight_decay": 0.5, "beta2": 0.9}
    resumed = Trainer(load_config(tiny.run_toml(*arguments, steps=2, optimiser=changed)))
    (group,) = resumed.optimisers[0].param_groups
    assert resumed.step == 1 and group["weight_decay"] == 0.5 and group["betas"] == (0.9, 0.9)


def test_a_damaged_checkpoint_is_named(world: Any, tmp_path: Path) -> None:
    path = tiny.run_toml(tmp_path, world.base, world.pairs, "subject", steps=1)
    Trainer(load_config(path)).run()
    (tmp_path / "checkpoints" / "step-00000001" / "optimiser.pt").write_bytes(b"cut off")
    with pytest.raises(CheckpointFolderError, match="step-00000001 cannot be gone on from"):
        Trainer(load_config(path))


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2), "more": torch.ones(1)}, path)
    found = checkpoints.read_weights(path, {"a": torch.Size((2,))})
    assert torch.equal(found["a"], torch.ones(2)) and len(found) == 1
    for name, shape, words in (("b", 2, "no such tensor"), ("a", 3, r"shape \(2,\)")):
        with pytest.raises(CheckpointFolderError, match=f"another run's .*{name}: .*{words}"):
            checkpoints.read_weights(path, {name: torch.Size((shape,))})


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_models_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"accelerate is set to {kind}"):
        check_distribution(kind)
    check_distribution("MULTI_GPU")


FULL = Path(__file__).parent / "full_disk.py"


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A child process that may write no file of more than 64 KiB: each writer's own error."""
    done = subprocess.run(
        [sys.executable, str(FULL), str(tmp_path)], env=environment(), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.keys() == {"checkpoint", "weights", "subject", "losses"}
    for name, text in said.items():
        assert "File too large" in text and "free" in text, name
    assert "CheckpointFolderError: run.folder: the checkpoint of step 1" in said["checkpoint"]
    assert "CheckpointError: out.safetensors" in said["weights"]
    assert "SubjectError: name: fox.safetensors" in said["subject"]
    assert "CheckpointFolderError: run.folder: the curve of the losses" in said["losses"]
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size]
    assert [p.name for p in left] == ["losses.jsonl"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    def good(path: Path) -> None:
        (path / "weights").write_bytes(b"good")

    def full(path: Path) -> None:
        (path / "weights").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    checkpoints.write(tmp_path, 1, 3, good)
    with pytest.raises(CheckpointFolderError, match="step 2 cannot be written.*No space"):
        checkpoints.write(tmp_path, 2, 3, full)
    assert checkpoints.newest(tmp_path) == (1, tmp_path / "step-00000001")
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_half_a_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    (tmp_path / "step-00000009.partial").mkdir()
    assert checkpoints.newest(tmp_path) is None and checkpoints.newest(tmp_path / "no") is None


def test_half_a_checkpoint_goes_when_the_next_is_written(tmp_path: Path) -> None:
    """One of an SDXL run has up to 39 GiB, and another step's number than those that follow."""
    (tmp_path / "step-00000009.partial").mkdir()
    checkpoints.write(tmp_path, 10, 3, lambda path: (path / "run.json").write_text("{}"))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
