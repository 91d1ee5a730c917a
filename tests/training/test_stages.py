"""Both stages learn, reach exactly their own parameters, and export what the nodes load."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anystory_core.training.batches import Batch
from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer
from anystory_core.weights.checkpoint import load_model
from anystory_core.weights.model import PARTS

# `world`, `subject_run` and `router_run` come from conftest.py.


def test_the_subject_stage_learns(subject_run: Any) -> None:
    assert subject_run.after["loss"] < 0.8 * subject_run.before["loss"]
    parts = load_model(subject_run.file).parts
    assert parts == tiny.SUBJECT_PARTS


def test_the_router_stage_learns(router_run: Any) -> None:
    for name in ("loss", "route", "coarse", "mean_route"):
        # Measured: 0.77 to 0.85. A router that learns nothing stays at 1.
        assert router_run.after[name] < 0.9 * router_run.before[name], name
    assert router_run.file.name == "anystory.safetensors"
    model = load_model(router_run.file)
    assert model.parts == tuple(PARTS)
    assert load_model(router_run.folder / "anystory_router.safetensors").parts == (
        "routing_encoder",
        "routers",
    )


def test_the_frozen_parts_are_those_of_stage_1(subject_run: Any, router_run: Any) -> None:
    first, both = (
        load_model(subject_run.file).state_dict(),
        load_model(router_run.file).state_dict(),
    )
    assert all(torch.equal(tensor, both[name]) for name, tensor in first.items())


@pytest.mark.parametrize("stage", ["subject", "router"])
def test_sheets(stage: str, subject_run: Any, router_run: Any) -> None:
    run = subject_run if stage == "subject" else router_run
    (sheet,) = (run.folder / "sheets").glob("*.png")
    # Stage 1: reference, target, sample; stage 2: two references and two maps beside.
    columns = 3 if stage == "subject" else 6
    picture = Image.open(sheet)
    assert picture.width == columns * tiny.SIZE and picture.height > 4 * (tiny.SIZE + 14)
    shown = EventAccumulator(str(run.folder / "logs" / "training"), size_guidance={"images": 1})
    shown.Reload()
    (event,) = shown.Images("sheet")
    assert (event.width, event.height) == picture.size


def test_curves_for_tensorboard(router_run: Any) -> None:
    curves = EventAccumulator(str(router_run.folder / "logs" / "training"))
    curves.Reload()
    lines = (router_run.folder / "losses.jsonl").read_text().splitlines()
    for name in ("loss", "diffusion", "route", "coarse", "mean_route"):
        drawn = {event.step: event.value for event in curves.Scalars(f"loss/{name}")}
        written = {line["step"]: line[name] for line in map(json.loads, lines)}
        assert drawn == pytest.approx(written, rel=1e-6)


@pytest.fixture
def another_precision() -> Iterator[None]:
    """accelerate keeps the precision of a process's first run for all others."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("another_precision")
def test_a_sheet_in_half_precision(world: Any, subject_file: Path, tmp_path: Path) -> None:
    """Stage 2 keeps its frozen parts in the base's precision, and draws with them."""
    run = trainer(
        world, tmp_path, "router", subject_file, precision="bf16", sheet_every=1, sheet_steps=1
    )
    model = run.stage.model
    assert model.reference_net.input_blocks[0][0].weight.dtype == torch.bfloat16
    assert {p.dtype for _, p in run.stage.trained()} == {torch.float32}
    run.run()
    (sheet,) = (tmp_path / "sheets").glob("*.png")
    assert Image.open(sheet).width == 6 * tiny.SIZE
    (kept,) = (tmp_path / "checkpoints").glob("*/model.safetensors")
    assert set(load_file(kept)) == {name for name, _ in run.stage.trained()}


def test_dropped_clip_is_the_backgrounds(world: Any, tmp_path: Path) -> None:
    path = tiny.run_toml(
        tmp_path, world.base, world.pairs, "subject", steps=1,
        subject={"drop_clip": 1.0}, run={"batch": 2},
    )  # fmt: skip
    run = Trainer(load_config(path))
    batch = Batch.join([run.dataset[i] for i in range(2)])
    assert bool(batch.drop_clip.all())
    kept = dataclasses.replace(batch, drop_clip=torch.zeros(2, dtype=torch.bool))
    with torch.no_grad():
        dropped, whole = (run.stage.conditions(b, ()).prepared.conditions[0] for b in (batch, kept))
    background = dropped.clip[1].k
    assert torch.equal(dropped.clip[0].k, background.expand(2, -1, -1))
    assert torch.equal(dropped.clip[0].v, dropped.clip[1].v.expand(2, -1, -1))
    assert not torch.allclose(whole.clip[0].k, background.expand(2, -1, -1))


def trainer(world: Any, folder: Path, stage: str, file: Path | None, **run: Any) -> Trainer:
    tables: dict[str, Any] = {"run": run}
    if file is not None:
        tables["router"] = {"subject_file": str(file)}
    data = world.pairs if stage == "subject" else world.scenes
    return Trainer(load_config(tiny.run_toml(folder, world.base, data, stage, steps=1, **tables)))


def gradients(trainer: Trainer) -> dict[str, torch.Tensor | None]:
    batch = Batch.join([trainer.dataset[i] for i in range(4)])
    losses = trainer.stage(batch, trainer.noised(batch))
    losses["loss"].backward()
    assert all(p.grad is None for p in trainer.frozen.unet.parameters())
    return {name: p.grad for name, p in trainer.stage.named_parameters()}


@pytest.mark.parametrize("stage", ["subject", "router"])
def test_gradients_reach_the_stage_and_nothing_else(
    stage: str, world: Any, subject_file: Path, tmp_path: Path
) -> None:
    file = subject_file if stage == "router" else None
    plain = gradients(trainer(world, tmp_path / "plain", stage, file))
    own = ("encoder.routing.", "routers.")
    no_input = "reference_net.label_emb.0.0.weight"  # multiplies the zero label
    for name, gradient in plain.items():
        if stage == "subject" or name.startswith(own):
            assert gradient is not None and (bool(gradient.any()) or name == no_input), name
        else:
            assert gradient is None, name
    recomputed = gradients(trainer(world, tmp_path / "again", stage, file, checkpointing=True))
    for name, gradient in plain.items():
        if gradient is not None:
            other = recomputed[name]
            # The same float32 operations, but sums may be taken in another order.
            assert other is not None and torch.allclose(gradient, other, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("off", ["clip", "reference"])
def test_a_branch_can_be_switched_off(off: str, world: Any, tmp_path: Path) -> None:
    path = tiny.run_toml(
        tmp_path, world.base, world.pairs, "subject", steps=1, subject={off: False}
    )
    kept = load_model(Trainer(load_config(path)).run()).parts
    clip, reference = (
        ("subject_encoder", "clip_projections"),
        ("reference_net", "reference_projections"),
    )
    assert set(kept) == set(reference if off == "clip" else clip)


def test_a_router_without_refinement(world: Any, subject_file: Path, tmp_path: Path) -> None:
    """It is joined with stage 1's file, which says nothing of routers."""
    path = tiny.run_toml(
        tmp_path, world.base, world.scenes, "router", steps=1,
        router={"subject_file": str(subject_file), "refine": False},
    )  # fmt: skip
    joined = load_model(Trainer(load_config(path)).run())
    assert joined.routers is not None and joined.reference_net is not None
    assert not joined.config.router.refine
    assert not any("refine" in name for name in joined.state_dict())


@pytest.mark.parametrize("stage", ["subject", "router"])
def test_training_goes_on_from_a_file(
    stage: str, subject_run: Any, router_run: Any, world: Any, tmp_path: Path
) -> None:
    """Before its first step a run from a file holds that file's weights, not the U-Net's."""
    file = (subject_run if stage == "subject" else router_run).file
    tables: dict[str, Any] = {stage: {"start_file": str(file)}}
    data = world.pairs
    if stage == "router":
        tables["router"]["subject_file"] = str(subject_run.file)
        data = world.scenes
    path = tiny.run_toml(tmp_path, world.base, data, stage, steps=1, **tables)
    run = Trainer(load_config(path))
    wanted = load_model(file, dtype=torch.float32).state_dict()
    for name, parameter in run.stage.trained():
        assert torch.equal(parameter, wanted[name]), name


def test_training_goes_on_from_public_sizes(world: Any, tmp_path: Path) -> None:
    """A file of IP-Adapter's has fewer queries than the paper's; the run takes its sizes."""
    own = tiny.config()
    fewer = replace(own, subject_qformer=replace(own.subject_qformer, queries=2))
    file = tmp_path / "public.safetensors"
    tiny.write_weights(file, parts=tiny.SUBJECT_PARTS, model=fewer)
    path = tiny.run_toml(
        tmp_path / "run", world.base, world.pairs, "subject", steps=1,
        subject={"start_file": str(file)},
    )  # fmt: skip
    assert load_model(Trainer(load_config(path)).run()).config == fewer


def test_a_router_without_refinement_goes_on_from_one_with_it(
    subject_run: Any, router_run: Any, world: Any, tmp_path: Path
) -> None:
    """The ablation of Fig. 6 for equal steps: the same coarse maps, the refinement left out."""
    path = tiny.run_toml(
        tmp_path, world.base, world.scenes, "router", steps=1,
        router={
            "subject_file": str(subject_run.file),
            "start_file": str(router_run.file),
            "refine": False,
        },
    )  # fmt: skip
    run = Trainer(load_config(path))
    wanted = load_model(router_run.file, dtype=torch.float32).state_dict()
    names = [name for name, _ in run.stage.trained()]
    assert names and not any("refine" in name for name in names)
    for name, parameter in run.stage.trained():
        assert torch.equal(parameter, wanted[name]), name


def test_stage_2_encodes_the_references_that_are_there(
    world: Any, subject_file: Path, tmp_path: Path
) -> None:
    """Scenes hold one and two shapes in turn, and a batch has two places for each."""
    run = trainer(world, tmp_path, "router", subject_file)
    batch = Batch.join([run.dataset[i] for i in range(4)])
    there = int(batch.present.sum())
    assert 4 <= there < 8
    read: list[int] = []
    stage = run.saver.stage
    stage.model.reference_net.register_forward_pre_hook(lambda _, x: read.append(len(x[0])))
    with torch.no_grad():
        call = stage.conditions(batch, ())
    assert read == [there]
    own = call.prepared.conditions[1].reference
    for place in range(2):
        for row in range(4):
            assert bool(own[place].k[row].any()) == bool(batch.present[row, place])


def test_ema_and_accumulation(world: Any, tmp_path: Path) -> None:
    path = tiny.run_toml(
        tmp_path, world.base, world.pairs, "subject", steps=2,
        run={"accumulate": 2, "batch": 2}, optimiser={"ema": 0.9, "warmup_steps": 2},
    )  # fmt: skip
    run = Trainer(load_config(path))
    exported = load_model(run.run()).state_dict()
    name = "projections.clip.1.to_k.weight"
    live = dict(run.stage.named_parameters())[name]
    assert torch.equal(exported[name], run.saver.average.tensors[name])
    assert not torch.equal(exported[name], live)


def test_an_average_that_begins_late(world: Any, tmp_path: Path) -> None:
    """A run goes on with a moving average that its checkpoints do not have: it begins there."""
    path = tiny.run_toml(tmp_path, world.base, world.pairs, "subject", steps=1)
    Trainer(load_config(path)).run()
    path = tiny.run_toml(
        tmp_path, world.base, world.pairs, "subject", steps=2, optimiser={"ema": 0.5}
    )
    run = Trainer(load_config(path))
    trained = dict(run.stage.trained())
    name = "projections.clip.1.to_k.weight"
    assert run.step == 1 and torch.equal(run.saver.average.tensors[name], trained[name])
    run.run()
    assert not torch.equal(run.saver.average.tensors[name], trained[name])


def test_the_vae_keeps_its_precision(world: Any, tmp_path: Path) -> None:
    """A step under autocast may ask for latents that nobody has encoded before it."""
    base = trainer(world, tmp_path, "subject", None).frozen
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    outside = base.encode_picture(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(base.encode_picture(pixels), outside)
        inside = base.decode_picture(outside)
    assert torch.equal(inside, base.decode_picture(outside))


def test_the_learning_rate_warms_up_and_decays(world: Any, tmp_path: Path) -> None:
    path = tiny.run_toml(
        tmp_path, world.base, world.pairs, "subject", steps=4, run={"log_every": 1},
        optimiser={"learning_rate": 0.01, "warmup_steps": 2, "schedule": "cosine"},
    )  # fmt: skip
    Trainer(load_config(path)).run()
    lines = (tmp_path / "losses.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    # Half of cos(0), then cos(pi / 4), cos(pi / 2), cos(3 pi / 4), each raised to [0, 1].
    assert rates == pytest.approx([0.005, 0.0085355, 0.005, 0.0014645], rel=1e-4)


PLAIN = {"rotate": 0.0, "crop": 0.0, "pad": 0.0, "flip": 0.0}


@pytest.mark.parametrize("changes", [{}, PLAIN], ids=["augmented", "plain"])
def test_the_cache_changes_nothing(world: Any, tmp_path: Path, changes: Any) -> None:
    losses = []
    for folder, cache in (
        ("a", ""),
        ("b", str(tmp_path / "cache")),
        ("c", str(tmp_path / "cache")),
    ):
        path = tiny.run_toml(
            tmp_path / folder, world.base, world.pairs, "subject", steps=2, data={"cache": cache},
            augment=changes,
        )  # fmt: skip
        Trainer(load_config(path)).run()
        last = (tmp_path / folder / "losses.jsonl").read_text().splitlines()[-1]
        losses.append(json.loads(last)["loss"])
    # What is not there yet is encoded in a smaller batch: the same up to float32 rounding.
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    kept = [set(load_file(p)) for p in (tmp_path / "cache").rglob("*.safetensors")]
    kinds = set().union(*kept)
    # Augmented references differ every time: keeping them would only fill the disk.
    assert {"states", "pooled", "latents"} <= kinds
    assert ("clip" in kinds) == bool(changes)
    latents = [names for names in kept if "latents" in names]
    assert (len(latents) > 8) == bool(changes)  # two steps of four targets, and of references
