"""Muon of the lab: torch's own on matrices, one batched product for all of a shape, convolutions as
matrices; and the phase that goes on from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lab.muon
import lab.phase
from lab.muon import Muon, orthogonal
from lab.phase import Phase

TYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("computed_in", TYPES)
def test_singular_values_come_near_one(computed_in: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for rows, columns in ((32, 96), (96, 32)):  # a square one has values too near zero
        given = (
            torch.randn(3, rows, columns, generator=g)
            * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
        )
        made = orthogonal(given, computed_in)
        assert made.dtype == computed_in
        made = made.float()
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.5 and values.max() < 1.3
        # Of the same singular vectors the product with the given one is nearly symmetric.
        square = made.transpose(1, 2) @ given
        assert (square - square.transpose(1, 2)).norm() < 0.1 * square.norm()
    assert orthogonal(torch.zeros(1, 4, 8)).abs().max() == 0


@pytest.mark.parametrize("computed_in", TYPES)
def test_matrices_move_as_with_torchs_own(computed_in: torch.dtype) -> None:
    """Which works in bfloat16; its rate is adjusted to AdamW's size in the same way."""
    torch.manual_seed(1)
    start = [torch.randn(24, 40), torch.randn(24, 40), torch.randn(40, 16)]
    ours = [nn.Parameter(x.clone()) for x in start]
    theirs = [nn.Parameter(x.clone()) for x in start]
    muon = Muon(ours, 1e-2, 0.1, computed_in)
    own = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        muon.step()
        own.step()
    for one, two, before in zip(ours, theirs, start, strict=True):
        moved = (one - before).norm()
        assert (one - two).norm() < 0.02 * moved and moved > 0.1


@pytest.mark.parametrize("half", [True, False])
def test_a_phase_computes_in_what_the_processor_is_fast_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """Without units for bfloat16 a step of the mini base took 20 times as long in it."""
    monkeypatch.setattr(lab.phase, "half_is_faster", lambda: half)
    products: list[torch.dtype] = []

    def kept(matrices: Tensor, computed_in: torch.dtype) -> Tensor:
        products.append(computed_in)
        return orthogonal(matrices, computed_in)

    monkeypatch.setattr(lab.muon, "orthogonal", kept)
    phase = Phase(
        name="line", folder=tmp_path, steps=1, learning_rate=0.1, seed=1, optimiser="muon"
    )
    module = nn.Linear(4, 2)
    phase.run(module, lambda step, generator: module(torch.ones(1, 4)).square().sum())
    assert products == [torch.bfloat16 if half else torch.float32]


def test_convolutions_are_matrices_and_vectors_are_refused() -> None:
    conv = nn.Conv2d(8, 16, 3, bias=False)
    before = conv.weight.detach().clone()
    muon = Muon(conv.parameters(), 1e-2, 0.0)
    conv.weight.grad = torch.randn_like(conv.weight)
    muon.step()
    step = (conv.weight.detach() - before).flatten(1)
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.5 * values.max()
    # 16 values of about 1 in a matrix of 16 x 72, times 0.2 lr sqrt(72)
    assert step.square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.3)
    with pytest.raises(ValueError, match="matrices"):
        Muon(nn.LayerNorm(16).parameters(), 1e-2, 0.0)
    with pytest.raises(ValueError, match="2D parameters"):  # why there is one of our own
        torch.optim.Muon(conv.parameters())


def test_a_phase_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, with both optimisers' states."""
    monkeypatch.setattr(lab.phase, "CHECKPOINT_SECONDS", -1)  # at every step

    def run(folder: Path, stop: int) -> dict[str, Tensor]:
        torch.manual_seed(2)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3))
        phase = Phase(
            name="x", folder=folder, steps=10, learning_rate=1e-2, seed=1, optimiser="muon", ema=0.9
        )

        def loss_of(step: int, generator: torch.Generator) -> Tensor:
            if step == stop:
                raise InterruptedError
            return net(torch.randn(8, 2, 4, 4, generator=generator)).square().mean()

        return phase.run(net, loss_of)

    straight = run(tmp_path / "straight", 99)
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut", 6)
    resumed = run(tmp_path / "cut", 99)
    assert all(torch.equal(x, resumed[name]) for name, x in straight.items())


def test_the_rate_stays_level_and_then_falls(tmp_path: Path) -> None:
    phase = Phase(name="x", folder=tmp_path, steps=1000, learning_rate=1.0, seed=1, level=0.5)
    assert phase.rate(200) == phase.rate(500) == 1.0 and phase.rate(750) == pytest.approx(0.51)
    assert phase.rate(0) == pytest.approx(0.02) and phase.rate(999) < 0.021
