"""Weights of which each process holds a part: the same run, its checkpoints good for any number of
processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_killed import forked, losses

from anystory_core.errors import ConfigError
from anystory_core.training.config import load_config
from anystory_core.training.export import export_checkpoint
from anystory_core.training.loop import Trainer

STEPS = 3


def toml(folder: Path, world: Any, **run: Any) -> Path:
    steps = run.pop("steps", STEPS)
    return tiny.run_toml(
        folder, world.base, world.pairs, "subject", steps=steps, optimiser={"ema": 0.9},
        validation={"every": STEPS, "samples": 3, "paths": [str(world.pairs)]},
        run={"batch": 2, "accumulate": 2, "log_every": 1, "checkpoint_every": "0.001 s",
             "checkpointing": True, "sheet_every": STEPS, "sheet_steps": 1, **run},
    )  # fmt: skip


def test_the_same_run_in_parts(world: Any, tmp_path: Path) -> None:
    whole, parts, late = (tmp_path / name for name in ("whole", "parts", "late"))
    paths = [toml(whole, world), toml(parts, world, shard=True), toml(late, world, shard=True)]
    jobs = [{"run": str(path)} for path in paths]
    jobs[-1]["begin"] = str(whole / "checkpoints" / "step-00000001")
    assert forked(tmp_path, jobs) == [[[0, 0]]] * len(jobs)
    assert [step for step, _ in losses(parts)] == list(range(1, STEPS + 1))
    for (_, one), (_, two) in zip(losses(whole), losses(parts), strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    lines = [
        [json.loads(x) for x in (f / "losses.jsonl").read_text().splitlines()]
        for f in (whole, parts)
    ]
    for one, two in zip(*lines, strict=True):
        for name in one.keys() & {"gradient_norm", "validation/error"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
    # What is exported, and what a checkpoint holds: whole tensors of the same names.
    for name in ("model.safetensors", "average.safetensors"):
        kept = [load_file(f / "checkpoints" / "step-00000002" / name) for f in (whole, parts)]
        assert kept[0].keys() == kept[1].keys()
        moved = [torch.cat([t.flatten() for t in k.values()]) for k in kept]
        # AdamW's steps have the rate's size, 0.001, wherever gradients are mere rounding.
        assert float((moved[0] - moved[1]).abs().mean()) < 1e-5
    exported = [load_file(export_checkpoint(f, 2, None)) for f in (whole, parts)]
    assert exported[0].keys() == exported[1].keys()
    # A run of whole weights goes on in parts.
    wanted = dict(losses(whole))
    assert [step for step, _ in losses(late)] == [2, 3]
    for step, loss in losses(late):
        assert loss == pytest.approx(wanted[step], rel=1e-6)
    # One process alone goes on from the parts' checkpoint.
    alone = Trainer(load_config(toml(parts, world, steps=STEPS + 1)))
    assert alone.step == STEPS
    newest = parts / "checkpoints" / "step-00000003"
    kept = load_file(newest / "model.safetensors")
    assert all(torch.equal(p, kept[name]) for name, p in alone.stage.trained())
    state = torch.load(newest / "optimiser.pt", weights_only=True)["optimiser"]["states"]
    for name, parameter in alone.stage.trained():
        moments = alone.optimisers[0].state[parameter]
        assert torch.equal(moments["exp_avg"], state[name]["exp_avg"]), name
        assert float(moments["step"]) == STEPS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimiser": {"name": "muon"}}, "run.shard: 'muon' needs whole tensors"),
        ({"run": {"precision": "fp16", "shard": True}}, "run.precision: 'fp16'"),
    ],
)
def test_what_cannot_be_sharded(changes: Any, words: str, world: Any, tmp_path: Path) -> None:
    tables = {"run": {"shard": True}, **changes}
    path = tiny.run_toml(tmp_path, world.base, world.pairs, "subject", steps=1, **tables)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_stage_2_needs_no_sharding(world: Any, tmp_path: Path) -> None:
    path = tiny.run_toml(
        tmp_path, world.base, world.scenes, "router", steps=1, run={"shard": True},
        router={"subject_file": "unused"},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="run.shard: is for stage 1"):
        load_config(path)
