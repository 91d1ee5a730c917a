"""Where curves and sheets go besides: wandb, without a network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import wandb

from anystory_core.errors import ConfigError
from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer


def toml(folder: Path, world: Any, steps: int) -> Path:
    return tiny.run_toml(
        folder, world.base, world.pairs, "subject", steps=steps, subject={"reference": False},
        run={"batch": 2, "log_every": 1, "sheet_every": 1, "sheet_steps": 1,
             "trackers": ["tensorboard", "wandb"]},
    )  # fmt: skip


def test_wandb_goes_on_with_the_same_run(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (1, 2):
        Trainer(load_config(toml(tmp_path, world, steps))).run()
    wandb.teardown()  # the process that writes the logs may be behind a run that has finished
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    own = (tmp_path / "wandb.id").read_text()
    assert len(runs) == 2 and all(run.name.endswith(own) for run in runs)
    pictures = [list((run / "files" / "media" / "images").glob("sheet_*.png")) for run in runs]
    assert all(pictures)
    for run in runs:
        (log,) = run.glob("*.wandb")
        written = log.read_bytes()
        assert b"loss/gradient_norm" in written and b"optimiser.learning_rate" in written
    lines = (tmp_path / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_tracker_that_is_not_there(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate would go on without it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"run\.trackers: wandb is not installed; pip install"):
        Trainer(load_config(toml(tmp_path, world, 1)))
