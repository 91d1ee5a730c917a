"""Two processes, killed at random: the run is the one that nobody killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
STEPS, KILLS = 30, 10  # each start does one or two steps, and a third at most


def forked(folder: Path, jobs: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Exit codes of each start of each job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(HERE / "forked.py"), str(folder / "jobs.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def losses(folder: Path) -> list[tuple[int, float]]:
    text = (folder / "losses.jsonl").read_text()
    return [(x["step"], x["loss"]) for x in map(json.loads, text.splitlines()) if "loss" in x]


def test_killed_ten_times_to_the_last_bit(world: Any, tmp_path: Path) -> None:
    """Either process, at any moment, checkpoints included; the other ends by itself."""
    paths = [
        tiny.run_toml(
            tmp_path / name, world.base, world.pairs, "subject", steps=STEPS,
            run={"batch": 1, "log_every": 1, "checkpoint_every": "0.001 s"},
            optimiser={"ema": 0.9}, validation={"every": 0},
        )
        for name in ("whole", "killed")
    ]  # fmt: skip
    whole, killed = forked(
        tmp_path, [{"run": str(paths[0])}, {"run": str(paths[1]), "kills": KILLS, "seed": 5}]
    )
    assert whole == [[0, 0]] and killed[-1] == [0, 0]
    assert len(killed) == KILLS + 1
    for codes in killed[:-1]:  # one was killed; what the other says depends on where it waited
        assert -signal.SIGKILL in codes and 0 not in codes, killed
    wanted = losses(tmp_path / "whole")
    assert [step for step, _ in wanted] == list(range(1, STEPS + 1))
    again = losses(tmp_path / "killed")
    assert len(again) > STEPS  # some steps were done twice, and agree both times
    assert set(again) == set(wanted)
    one, two = (
        load_file(path.parent / "anystory_subject.safetensors") for path in paths
    )  # of the averages
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
