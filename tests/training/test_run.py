"""What a run says, keeps and hands on, and how it is asked to end."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from anystory_core.errors import ConfigError
from anystory_core.routing.grids import SoftMaps
from anystory_core.training.__main__ import main
from anystory_core.training.batches import Batch
from anystory_core.training.config import load_config
from anystory_core.training.curves import Means
from anystory_core.training.export import export_checkpoint
from anystory_core.training.loop import Trainer
from anystory_core.training.measures import routing_iou, row_figures
from anystory_core.training.noise import Noised
from anystory_core.training.ranks import Ranks
from anystory_core.training.stopping import Stopped
from anystory_core.weights.checkpoint import load_model

ALONE = Ranks(torch.device("cpu"))


def toml(folder: Path, world: Any, **changes: Any) -> Path:
    tables: dict[str, Any] = {
        "run": {"batch": 2, "log_every": 1, **changes.pop("run", {})},
        "optimiser": {"ema": 0.9, **changes.pop("optimiser", {})},
    }
    return tiny.run_toml(folder, world.base, world.pairs, "subject", **tables, **changes)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def test_asked_to_end_it_saves_and_goes_on(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a step's micro-batches: what is not a whole step is done again. The start
    says what the run will do, a second start what has changed since."""
    whole = tmp_path / "whole"
    file = Trainer(load_config(toml(whole, world, steps=3, run={"accumulate": 2}))).run()
    path = toml(tmp_path / "cut", world, steps=3, run={"accumulate": 2})
    run = Trainer(load_config(path))
    step, count = run._micro_step, 0

    def counted(batch: Batch) -> None:
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        step(batch)

    run._micro_step = counted  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="saved step 1"):
        run.run()
    assert count == 3 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    said = capsys.readouterr().err
    for words in (
        "1 process x batch 2 x accumulate 2 = 4 samples a step, 3 steps",
        "64 samples: 16.0 steps an epoch, 0.2 epochs", "no validation: 400 samples",
        "base: epsilon is predicted", "trained parameters in encoder, projections, reference_net",
        "before activations",
    ):  # fmt: skip
        assert words in said
    changed = path.read_text().replace("ema = 0.9", "ema = 0.9\nclip_norm = 1e9")
    path.write_text(changed.replace("accumulate = 2", "accumulate = 1"))
    Trainer(load_config(path))
    said = capsys.readouterr().err
    assert "resuming from step 1" in said
    assert "optimiser.clip_norm = 1000000000.0, before 1.0" in said
    assert "a step is 2 samples now, 4 before" in said
    again = Trainer(load_config(toml(tmp_path / "cut", world, steps=3, run={"accumulate": 2})))
    assert again.step == 1
    one, two = load_file(file), load_file(again.run())
    assert all(torch.equal(one[name], two[name]) for name in one)
    wanted = {line["step"]: line["loss"] for line in lines(whole)}
    assert all(line["loss"] == wanted[line["step"]] for line in lines(tmp_path / "cut"))
    measured = lines(whole)[0]
    assert measured["gradient_norm"] > 0 and measured["seconds"] > 0
    assert 0.1 < measured["peak_memory_gib"] < 64


def test_offloaded_activations_change_nothing(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for the backward pass waits elsewhere, when asked, and comes back as it was."""
    left: list[int] = []  # bytes that were moved, by run

    class Watched(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(pin_memory)
            pack = self.pack_hook

            def counted(x: Tensor) -> Any:
                left[-1] += x.numel() * x.element_size()
                return pack(x)

            self.pack_hook = counted

    monkeypatch.setattr("anystory_core.training.loop.save_on_cpu", Watched)
    files = []
    for asked in (False, True):
        left.append(0)
        run = {"offload_activations": asked, "checkpointing": False}
        files.append(
            Trainer(load_config(toml(tmp_path / str(asked), world, steps=2, run=run))).run()
        )
    assert left[0] == 0 and left[1] > 1_000_000
    one, two = (load_file(file) for file in files)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_checkpoints_are_exported(world: Any, tmp_path: Path) -> None:
    path = toml(tmp_path, world, steps=2, run={"checkpoint_every": "0.001 s"})
    run = Trainer(load_config(path))
    file = run.run()
    final = load_file(file)
    assert main(["export", str(tmp_path)]) == 0
    newest = load_file(tmp_path / "export" / "step-00000002-average" / file.name)
    assert all(torch.equal(final[name], newest[name]) for name in final)
    live = load_file(export_checkpoint(tmp_path, 2, False))
    trained = dict(run.saver.stage.trained())
    assert all(torch.equal(live[name], trained[name]) for name in live)
    early = export_checkpoint(tmp_path, 1, None)
    assert early.parent.name == "step-00000001-average"
    assert load_model(early).parts == load_model(file).parts
    with safe_open(early, "pt") as opened:
        header = opened.metadata()
    assert header["anystory.subject_steps"] == "1"
    made = json.loads(header["anystory.subject_training"])
    assert made["settings"]["run"]["batch"] == 2
    assert torch.__version__.startswith(made["versions"]["torch"])  # +cu130 is left out
    assert str(tmp_path) not in header["anystory.subject_training"]  # files are handed on
    for arguments, words in (
        ((tmp_path, 7, None), r"no checkpoint of step 7, expected one of \[1, 2\]"),
        ((tmp_path / "no", None, None), "holds no checkpoint"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_checkpoint(*arguments)


def test_validation_is_the_same_each_time(world: Any, subject_file: Path, tmp_path: Path) -> None:
    """Of stage 2 on scenes of its own: figures of each piece of the timesteps, and none of it
    changes what is learned."""
    losses = []
    for every in (0, 1):
        folder = tmp_path / str(every)
        path = tiny.run_toml(
            folder, world.base, world.scenes, "router", steps=2, run={"batch": 2, "log_every": 1},
            router={"subject_file": str(subject_file)},
            validation={"every": every, "paths": [str(world.scenes)], "samples": 3, "levels": 2},
        )  # fmt: skip
        run = Trainer(load_config(path))
        run.run()
        losses.append([line["loss"] for line in lines(folder) if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert run.validation is not None

    def measure(batch: Batch, noised: Noised) -> dict[str, Tensor]:
        return run.stage(batch, noised, measure=True)

    found = run.validation.run(measure, run.ranks)
    names = {"error", "inside", "outside", "routing_iou"}
    assert found.keys() == {f"{n}{p}" for n in names for p in ("", " 0-499", " 500-999")}
    assert found["error"] == pytest.approx((found["error 0-499"] + found["error 500-999"]) / 2)
    # Of a mean over each picture, the shape and its ground are parts.
    assert min(found["inside"], found["outside"]) < found["error"]
    assert max(found["inside"], found["outside"]) > found["error"]
    last = [line for line in lines(tmp_path / "1") if "validation/error" in line][-1]
    for name, value in found.items():
        assert last[f"validation/{name}"] == pytest.approx(value, rel=1e-5)


def test_figures_of_rows_by_hand() -> None:
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, 0, :4] = 1
    none = torch.zeros(2)
    batch = Batch(
        numbers=(0, 1), keys=("", ""), captions=("", ""), target=none, time_ids=none, masks=masks,
        clip=none, vae=none, reference_mask=none, present=torch.tensor([[True], [False]]),
        drop_clip=none, bad=(),
    )  # fmt: skip
    difference = torch.zeros(2, 4, 4, 4)
    difference[0, :, :2], difference[0, :, 2:], difference[1] = 3.0, 1.0, 2.0
    maps = torch.zeros(2, 2, 16)
    maps[:, 0, :12], maps[:, 1, 12:] = 1, 1  # the first three rows of four
    soft = [SoftMaps(maps, (4, 4))]
    figures = row_figures(difference, torch.zeros_like(difference), batch, soft)
    assert figures["error"].tolist() == [5.0, 4.0]
    assert float(figures["inside"][0]) == 9.0 and float(figures["outside"][0]) == 1.0
    assert math.isnan(figures["inside"][1]) and math.isnan(figures["routing_iou"][1])
    assert float(figures["routing_iou"][0]) == pytest.approx(32 / 48)
    true = torch.zeros(2, 2, 16)
    true[:, 0, :8], true[:, 1, 8:] = 1, 1
    assert float(routing_iou([SoftMaps(true, (4, 4))], batch, (4, 4))[0]) == 1.0


def test_means_are_over_all_micro_batches() -> None:
    means = Means()
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value)})
    means.add({"norm": torch.tensor(4.0)})
    assert means.take(ALONE) == {"loss": 3.0, "norm": 4.0}
    assert means.take(ALONE) == {}
