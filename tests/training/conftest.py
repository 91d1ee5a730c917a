"""A tiny base and data set for all training tests, and one run of each stage on a base that has
learned to draw."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import tiny

from anystory_core.data import shards
from anystory_core.training.batches import Batch
from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer
from anystory_core.training.noise import make_noised

SUBJECT_STEPS, ROUTER_STEPS = 100, 80


@dataclass
class World:
    """Paths of the base, of pair shards and of a folder of scenes."""

    base: Path
    pairs: Path
    scenes: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Of random networks: for all that does not ask what is learned."""
    folder = tmp_path_factory.mktemp("world")
    tiny.write_base(folder / "base")
    shards.write_shards(tiny.pairs(64), folder / "pairs", per_shard=40)
    shards.write_folder(tiny.scenes(64), folder / "scenes")
    return World(folder / "base", folder / "pairs", folder / "scenes")


@pytest.fixture(scope="session")
def taught(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same data, and a base that draws shapes. It costs a minute: for one file of tests."""
    base = tmp_path_factory.mktemp("taught") / "base"
    tiny.write_base(base, train_steps=300, vae_width=64)
    return World(base, world.pairs, world.scenes)


@pytest.fixture(scope="session")
def subject_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stage 1 exports, of random weights."""
    file = tmp_path_factory.mktemp("file") / "anystory_subject.safetensors"
    tiny.write_weights(file, parts=tiny.SUBJECT_PARTS)
    return file


@dataclass
class Done:
    """A finished run: its weights file, and its losses on one fixed batch before and after."""

    folder: Path
    file: Path
    before: dict[str, float]
    after: dict[str, float]


def losses_of(trainer: Trainer, timestep: int) -> dict[str, float]:
    """Losses on 8 fixed samples at a fixed noise level, with fixed noise."""
    batch = Batch.join([trainer.dataset[i] for i in range(8)])
    encoded = trainer.encodings.encode(batch)
    noise = torch.randn(encoded.latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((8,), timestep)
    noised = make_noised(trainer.schedule, encoded, noise, t, tuple(range(8)))
    with torch.no_grad():
        return {name: float(value) for name, value in trainer.stage(batch, noised).items()}


def finish(path: Path, timestep: int) -> Done:
    """Run a TOML to its end."""
    trainer = Trainer(load_config(path))
    before = losses_of(trainer, timestep)
    file = trainer.run()
    return Done(path.parent, file, before, losses_of(trainer, timestep))


@pytest.fixture(scope="session")
def subject_run(taught: World, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("subject")
    path = tiny.run_toml(
        folder, taught.base, taught.pairs, "subject", steps=SUBJECT_STEPS,
        optimiser={"learning_rate": 2e-3}, data={"cache": str(folder / "cache")},
        run={"batch": 8, "sheet_every": SUBJECT_STEPS, "sheet_steps": 2},
    )  # fmt: skip
    return finish(path, 400)


@pytest.fixture(scope="session")
def router_run(taught: World, subject_run: Done, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("router")
    path = tiny.run_toml(
        folder, taught.base, taught.scenes, "router", steps=ROUTER_STEPS,
        router={"subject_file": str(subject_run.file), "tokens": "sum", "mean_weight": 1.0},
        data={"cache": str(folder / "cache")},
        run={"sheet_every": ROUTER_STEPS, "sheet_steps": 2},
    )  # fmt: skip
    return finish(path, 500)
