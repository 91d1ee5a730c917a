"""Helpers of the tests of data, which take the training tests' toy base along."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "training"))

import tiny

from anystory_core.data.__main__ import main
from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer
from anystory_core.weights.checkpoint import save_model
from anystory_core.weights.model import build_model

ROOT = Path(__file__).resolve().parents[2]


class Commands:
    """The command line, in this process or in one of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> str:
        """Run a command that must succeed, in one process; what it printed."""
        code, out, error = self.ended(*arguments)
        assert code == 0, error or out
        return out

    def ended(self, *arguments: object) -> tuple[int, str, str]:
        """(exit code, standard output, standard error) of a command in one process."""
        code = main([*map(str, arguments), "--workers", "1"])
        said = self.capsys.readouterr()
        return code, said.out, said.err

    @staticmethod
    def apart(*arguments: object, **variables: str) -> subprocess.Popen[str]:
        """Start it as a user does."""
        command = [sys.executable, "-m", "anystory_core.data", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


@pytest.fixture
def data(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untrained base, and a file of stage 1 for the router to be trained on."""
    folder = tmp_path_factory.mktemp("world")
    tiny.write_base(folder / "base")
    parts = ("subject_encoder", "clip_projections", "reference_net", "reference_projections")
    model = build_model(tiny.config(), parts)
    save_model(folder / "subject.safetensors", model, tiny.config())
    return {"base": folder / "base", "subject": folder / "subject.safetensors"}


@pytest.fixture
def train(world: dict[str, Path], tmp_path: Path) -> Callable[..., Trainer]:
    """Train two steps on a folder of samples: a loss that is a number, nothing corrupt."""

    def two_steps(samples: Path, stage: str, **changes: dict[str, Any]) -> Trainer:
        folder = tmp_path / f"run-{samples.name}-{stage}"
        if stage == "router":
            changes = {**changes, "router": {"subject_file": str(world["subject"])}}
        path = tiny.run_toml(folder, world["base"], samples, stage, steps=2, **changes)
        trainer = Trainer(load_config(path))
        trainer.run()
        lines = (folder / "losses.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        assert losses and all(math.isfinite(loss) for loss in losses)
        assert not trainer.corrupt.found
        return trainer

    return two_steps
