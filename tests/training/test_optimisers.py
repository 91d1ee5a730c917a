"""Optimisers by name: each learns, takes the memory that is said, and goes on from a checkpoint to
the last bit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from anystory_core.errors import ConfigError
from anystory_core.training import optimisers
from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer
from anystory_core.training.optimisers import (
    build_optimisers,
    load_state,
    read_state,
    set_rate,
    state_bytes,
)
from anystory_core.training.ranks import Ranks
from anystory_core.training.settings import OptimiserSettings
from anystory_core.training.sharding import whole

ALONE = Ranks(torch.device("cpu"))
KINDS = {
    "adamw": OptimiserSettings(learning_rate=1e-2),
    "adamw in bf16": OptimiserSettings(learning_rate=1e-2, weights="bf16"),
    "8 bit": OptimiserSettings(name="adamw_8bit", learning_rate=1e-2),
    "8 bit in bf16": OptimiserSettings(name="adamw_8bit", learning_rate=1e-2, weights="bf16"),
    "adafactor": OptimiserSettings(name="adafactor", learning_rate=1e-2),
    "prodigy": OptimiserSettings(name="prodigy", learning_rate=1.0),
    "muon": OptimiserSettings(name="muon", learning_rate=1e-2),
}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles a step for each shape, which takes a C++ compiler some seconds each."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def net(settings: OptimiserSettings) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Unflatten(1, (6, 4, 4)))
    made.extend([nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(32, 8)])
    return made.to(torch.bfloat16 if settings.weights == "bf16" else torch.float32)


def train(model: nn.Module, made: list[Any], steps: range, rate: float) -> list[float]:
    """Fit one fixed batch; the losses."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 64, generator=g), torch.randn(16, 8, generator=g)
    losses = []
    for step in steps:
        set_rate(made, rate)
        dtype = next(model.parameters()).dtype
        loss = (model(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        torch.manual_seed(step)
        for optimiser in made:
            optimiser.step()
            optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def copied(state: Any) -> Any:
    """Through a file, as a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", KINDS)
def test_each_learns_and_goes_on_to_the_last_bit(name: str) -> None:
    settings = KINDS[name]
    rate = settings.learning_rate
    straight = net(settings)
    losses = train(straight, build_optimisers(list(straight.parameters()), settings),
                   range(12), rate)  # fmt: skip
    assert losses[-1] < 0.9 * losses[0] or name == "prodigy" and losses[-1] < losses[0]

    first = net(settings)
    made = build_optimisers(list(first.parameters()), settings)
    train(first, made, range(7), rate)
    kept = copied(read_state(made, dict(first.named_parameters()), whole))
    second = net(settings)
    second.load_state_dict(first.state_dict())
    again = build_optimisers(list(second.parameters()), settings)
    load_state(again, dict(second.named_parameters()), kept, ALONE)
    before = {n: p.clone() for n, p in second.named_parameters()}
    assert all(torch.equal(p, first.state_dict()[n]) for n, p in before.items())
    assert train(second, again, range(7, 12), rate) == losses[7:]
    for one, two in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def held(value: Any) -> int:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return 0
    if is_traceable_wrapper_subclass(value):
        codes, scale = value.codes, value.scale  # type: ignore[attr-defined]
        return held(codes) + held(scale)
    return value.numel() * value.element_size()


@pytest.mark.parametrize("name", KINDS)
def test_memory_is_as_said(name: str) -> None:
    settings = KINDS[name]
    model = net(settings)
    parameters = list(model.parameters())
    made = build_optimisers(parameters, settings)
    train(model, made, range(1), settings.learning_rate)
    states = [state for optimiser in made for state in optimiser.state.values()]
    assert len(states) == len(parameters)
    real = sum(held(value) for state in states for value in state.values())
    assert real == state_bytes(parameters, settings)


def test_small_updates_survive_in_bf16_on_average() -> None:
    """Beside 1 the next bf16 number is 2^-8 away: steps of 1e-4 are lost when rounded to the
    nearest. 100 of them move 10,000 weights by 0.01, known to 0.2 % (a standard deviation of
    sqrt(100 * 1e-4 * 2^-9) over sqrt(10,000))."""
    settings = OptimiserSettings(learning_rate=1e-4, weights="bf16", weight_decay=0.0)
    weight = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    made = build_optimisers([weight], settings)
    torch.manual_seed(0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        made[0].step()
    assert float(1 - weight.detach().double().mean()) == pytest.approx(0.01, rel=0.05)


def test_muon_moves_matrices_in_all_directions_alike() -> None:
    """Its update is nearly orthogonal, whatever the gradient's own directions weigh; what is no
    matrix is AdamW's."""
    settings = OptimiserSettings(name="muon", learning_rate=1e-2, weight_decay=0.0)
    matrix, bias = nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.zeros(16))
    muon, adam = build_optimisers([matrix, bias], settings)
    scales = torch.logspace(0, -1, 16)
    g = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(16, 16, generator=g))[0]
    matrix.grad, bias.grad = turned @ torch.diag(scales), scales.clone()
    muon.step()
    adam.step()
    found = torch.linalg.svdvals(matrix.detach())
    assert float(found.max() / found.min()) < 3  # of the gradient: 10
    # AdamW's first step has the rate's size, whatever the gradient's; Muon's its mean square.
    assert torch.allclose(bias.detach(), torch.full((16,), -1e-2), rtol=1e-4)
    assert float(matrix.detach().square().mean().sqrt()) == pytest.approx(0.2 * 1e-2, rel=0.3)


@pytest.mark.parametrize("name", ["8 bit", "muon", "adafactor", "prodigy"])
def test_a_run_goes_on(name: str, world: Any, tmp_path: Path) -> None:
    """Killed after its first step, and started again, it ends with the same weights."""
    settings = KINDS[name]
    chosen = {"name": settings.name, "learning_rate": settings.learning_rate / 10}
    if name == "prodigy":
        chosen["learning_rate"] = 1.0

    def toml(folder: str, steps: int) -> Trainer:
        path = tiny.run_toml(
            tmp_path / folder, world.base, world.pairs, "subject", steps=steps, optimiser=chosen,
            run={"batch": 2}, subject={"reference": False},
        )  # fmt: skip
        return Trainer(load_config(path))

    straight = toml("straight", 2)
    straight.run()
    toml("cut", 1).run()
    resumed = toml("cut", 2)
    assert resumed.step == 1
    resumed.run()
    for (_, one), (_, two) in zip(
        straight.saver.stage.trained(), resumed.saver.stage.trained(), strict=True
    ):
        assert torch.equal(one, two)


def test_another_optimiser_begins_anew(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tmp_path, world.base, world.pairs, "subject"
    Trainer(load_config(tiny.run_toml(*arguments, steps=1))).run()
    other = {"name": "adafactor"}
    run = Trainer(load_config(tiny.run_toml(*arguments, steps=2, optimiser=other)))
    assert run.step == 1 and not run.optimisers[0].state
    assert "optimiser.name = adafactor, before adamw" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimiser": {"name": "muon", "weights": "bf16"}}, "optimiser.weights: got 'bf16' with"),
        ({"optimiser": {"weights": "bf16"}}, "with run.precision = 'no'"),
        ({"optimiser": {"name": "prodigy"}}, "finds the rate itself"),
        ({"optimiser": {"name": "lion"}}, "optimiser.name: got 'lion', expected one of"),
        ({"optimiser": {"name": "muon"}, "run": {"precision": "fp16"}}, "run.precision: 'fp16'"),
    ],
)
def test_what_does_not_go_together(changes: Any, words: str, world: Any, tmp_path: Path) -> None:
    path = tiny.run_toml(tmp_path, world.base, world.pairs, "subject", steps=1, **changes)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(optimisers, "library", missing)
    settings = replace(KINDS["8 bit"])
    with pytest.raises(ConfigError, match="'adamw_8bit' .* needs torchao .*pip install torchao"):
        build_optimisers([nn.Parameter(torch.zeros(2))], settings)
