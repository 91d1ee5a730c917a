"""A run that is killed and started again, and a run on two processes, are the run itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from anystory_core.checkpoint import load_model
from anystory_core.training import checkpoints
from anystory_core.training.checkpoints import CheckpointFolderError

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
STEPS = 8
KILLED_AFTER = 4


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
    subprocess.run([*command, str(whole)], env=environment(), check=True, capture_output=True)

    killed = toml(tmp_path / "killed", world)
    process = subprocess.Popen(
        [*command, str(killed)], env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 180
    while len(losses(killed.parent)) < KILLED_AFTER and time.monotonic() < end:
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


@pytest.mark.parametrize("stage", ["subject", "router"])
def test_two_processes_give_the_gradients_of_one(
    stage: str, world: Any, subject_run: Any, tmp_path: Path
) -> None:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for count in (1, 2):
        data = world.pairs if stage == "subject" else world.scenes
        extra = {"router": {"subject_file": str(subject_run.file)}} if stage == "router" else {}
        path = tiny.run_toml(
            tmp_path / f"{count}", world.base, data, stage, steps=1,
            run={"batch": 4 // count}, **extra,
        )  # fmt: skip
        out = tmp_path / f"{count}.pt"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count),
            "--standalone", str(HERE / "gradients.py"), str(path), str(out),
        ]  # fmt: skip
        variables = {**environment(), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found[count] = torch.load(out, weights_only=True)
    assert found[1].keys() == found[2].keys() and found[1]
    for name, gradient in found[1].items():
        # The mean of two halves against the mean of the whole: float32 rounding.
        assert torch.allclose(gradient, found[2][name], atol=1e-5, rtol=1e-4), name


def test_two_processes_run_to_the_end(world: Any, tmp_path: Path) -> None:
    """Both begin in one folder, one of them exports, and neither fails on the way out."""
    path = tiny.run_toml(
        tmp_path, world.base, world.pairs, "subject", steps=2, run={"batch": 2},
        optimiser={"ema": 0.9},
    )  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        "-m", "anystory_core.training", str(path),
    ]  # fmt: skip
    variables = {**environment(), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("anystory_subject.safetensors")
    assert "reference_net" in load_model(file).parts


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
