"""Eq. 1 and Eq. 4 in float64: by hand, and by finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anystory_core.bases.sdxl.prediction import Kind
from anystory_core.routing.grids import SoftMaps
from anystory_core.routing.router import RoutingLogits
from anystory_core.training.losses import (
    Weighting,
    diffusion_loss,
    map_error,
    mean_routing_loss,
    routing_loss,
    target_maps,
)
from anystory_core.training.noise import draw_noise, draw_timesteps
from anystory_core.training.settings import LossSettings, Tokens

PRESENT = torch.tensor([[True, True], [True, False], [False, False]])


def masks() -> Tensor:
    """(3,2,8,8): two subjects; one; none."""
    out = torch.zeros(3, 2, 8, 8)
    out[0, 0, :4, :4] = 1
    out[0, 1, 4:, 2:] = 1
    out[1, 0, 2:7, :] = 1
    return out


def test_targets_are_the_argmax_of_area_averages() -> None:
    target = target_maps(masks(), (4, 4))
    assert torch.equal(target.sum(dim=1), torch.ones(3, 16))
    first = target[0, 0].reshape(4, 4)
    assert torch.equal(first, torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]))
    assert torch.equal(target[2, -1], torch.ones(16))
    # Rows 2..6 of 8 cover token rows 1 and 2 wholly and half of row 3: a tie goes to the subject.
    assert torch.equal(target[1, 0].reshape(4, 4)[:, 0], torch.tensor([0.0, 1, 1, 1]))


def test_odd_grids() -> None:
    assert target_maps(masks(), (3, 5)).shape == (3, 3, 15)


@pytest.mark.parametrize("tokens", ["mean", "sum", "area"])
def test_equation_4_by_hand(tokens: Tokens) -> None:
    torch.manual_seed(0)
    maps = torch.rand(3, 3, 16, dtype=torch.float64).softmax(dim=1)
    target = target_maps(masks(), (4, 4)).double()
    rows = []
    for b in range(3):
        terms = []
        for i in range(2):
            if PRESENT[b, i]:
                found, wanted = maps[b, i].tolist(), target[b, i].tolist()
                square = sum((m - w) ** 2 for m, w in zip(found, wanted, strict=True))
                covered = sum(m**2 + w**2 for m, w in zip(found, wanted, strict=True))
                terms.append(square / {"mean": 16, "sum": 1, "area": 1 + covered}[tokens])
        rows.append(sum(terms) / len(terms) if terms else 0.0)
    got = map_error(maps, target, PRESENT, tokens)
    assert float(got) == pytest.approx(sum(rows) / 3, abs=1e-12)


def test_by_area_a_small_subject_missed_is_as_wrong_as_a_large_one() -> None:
    target = torch.zeros(2, 2, 10_000)
    target[0, 0, :40], target[1, 0, :4000] = 1, 1
    missed = torch.zeros_like(target)
    small, large = (
        float(map_error(missed[r : r + 1], target[r : r + 1], torch.ones(1, 1).bool(), "area"))
        for r in (0, 1)
    )
    assert 0.97 < small < large < 1


@pytest.mark.parametrize("tokens", ["mean", "area"])
def test_no_subject_no_route_loss(tokens: Tokens) -> None:
    maps = torch.rand(2, 3, 16, requires_grad=True)
    error = map_error(maps, torch.zeros(2, 3, 16), torch.zeros(2, 2, dtype=torch.bool), tokens)
    error.backward()
    assert float(error.detach()) == 0 and maps.grad is not None and not maps.grad.any()


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(1)
    coarse = torch.randn(3, 3, 16, dtype=torch.float64, requires_grad=True)
    refined = torch.randn(3, 3, 16, dtype=torch.float64, requires_grad=True)

    def loss(c: Tensor, r: Tensor) -> Tensor:
        soft = SoftMaps(r.softmax(dim=1), (4, 4), RoutingLogits(c, r))
        a, b = routing_loss([soft], masks(), PRESENT)
        return a + b + sum(mean_routing_loss([soft], masks(), PRESENT, (8, 8)))

    assert torch.autograd.gradcheck(loss, (coarse, refined))


def soft_maps(logits: Tensor, side: int) -> SoftMaps:
    return SoftMaps(logits.softmax(dim=1), (side, side), RoutingLogits(logits, logits))


def test_the_mean_map_s_masks_by_hand() -> None:
    """Against a transcription in float64: each block is enlarged, then their mean; of that,
    enlarged again, the sixth powers share out each place, and overlap is counted there."""
    g = torch.Generator().manual_seed(3)
    logits = [torch.randn(3, 3, side * side, generator=g).double() for side in (4, 2, 4)]
    blocks = [soft_maps(x, side) for x, side in zip(logits, (4, 2, 4), strict=True)]

    def enlarged(x: Tensor, side: int) -> Tensor:
        return torch.nn.functional.interpolate(x, size=(side, side), mode="bilinear")

    mean = sum(enlarged(b.maps.reshape(3, 3, *b.grid), 8) for b in blocks) / 3
    powers = enlarged(mean, 16) ** 6
    found = (powers / powers.sum(dim=1, keepdim=True))[:, :2]
    true = torch.nn.functional.interpolate(masks().double(), size=(16, 16), mode="nearest")
    wanted = 0.0
    for row in range(3):
        lost = []
        for i in range(2):
            if PRESENT[row, i]:
                both = float((found[row, i] * true[row, i]).sum())
                lost.append(1 - both / (float(found[row, i].sum() + true[row, i].sum()) - both))
        wanted += sum(lost) / len(lost) / 3 if lost else 0
    refined, coarse = mean_routing_loss(blocks, masks(), PRESENT, (8, 8))
    assert float(refined) == float(coarse) == pytest.approx(wanted, rel=1e-6)


def test_of_the_mean_map_a_block_that_does_not_know_may_say_so() -> None:
    """A block that is right and one that is wrong: Eq. 4 leaves the wrong one as it is best alone,
    and of the mean it is better when it says nothing."""
    right = 8 * (2 * target_maps(masks(), (8, 8)) - 1)
    wrong, unsure = -right, torch.zeros_like(right)

    def error(other: Tensor) -> float:
        blocks = [soft_maps(right, 8), soft_maps(other, 8)]
        return float(mean_routing_loss(blocks, masks(), PRESENT, (8, 8))[0])

    assert error(right) < error(unsure) < error(wrong)


def test_masks_that_lie_right_have_no_error() -> None:
    """How sure a place is does not matter to its mask, only which side it falls on."""
    target = target_maps(masks(), (16, 16))

    def error(sureness: float) -> float:
        soft = soft_maps(sureness * target, 16)
        return float(mean_routing_loss([soft], masks(), PRESENT, (16, 16))[0])

    assert error(2.0) < 0.02 < error(0.2) < error(-2.0)


def test_equation_1() -> None:
    a, b = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert float(diffusion_loss(a, b)) == pytest.approx(float(((a - b) ** 2).mean()), rel=1e-6)


def test_errors_inside_the_subject_count_more() -> None:
    """Against a transcription in float64; a picture without the subject's place counts as ever."""
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 4, 4, 4, generator=g), torch.randn(2, 4, 4, 4, generator=g)
    where = torch.zeros(2, 1, 8, 8)
    where[0, 0, 2:5, :6] = 1
    wanted = 0.0
    for row in range(2):
        share = where[row, 0].double().reshape(4, 2, 4, 2).mean(dim=(1, 3))
        weight = 1 + 3 * share
        errors = (a[row] - b[row]).double().square()
        wanted += float((weight * errors).mean() / weight.mean()) / 2
    assert float(diffusion_loss(a, b, None, where, 3.0)) == pytest.approx(wanted, rel=1e-6)
    assert float(diffusion_loss(a, b, None, where, 0.0)) == float(diffusion_loss(a, b))
    assert float(diffusion_loss(a, b, None, torch.zeros(2, 1, 8, 8), 3.0)) == pytest.approx(
        float(diffusion_loss(a, b)), rel=1e-6
    )


@pytest.mark.parametrize("huber", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_weights_of_eq_1_by_hand(kind: Kind, huber: float) -> None:
    """min-SNR and pseudo-Huber, against a transcription in float64."""
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 4, 3, 3, generator=g), torch.randn(2, 4, 3, 3, generator=g)
    snr = [0.25, 40.0]
    wanted = 0.0
    for row in range(2):
        d = (a[row] - b[row]).double()
        loss = 2 * huber * ((d**2 + huber**2).sqrt() - huber) if huber else d**2
        weight = min(snr[row], 5.0) / (snr[row] + (kind == "v"))
        wanted += weight * float(loss.mean()) / 2
    weighting = Weighting(LossSettings(min_snr=5.0, huber=huber), torch.tensor(snr), kind)
    assert float(diffusion_loss(a, b, weighting)) == pytest.approx(wanted, rel=1e-5)


def test_offset_noise_moves_a_channels_mean() -> None:
    """Its mean over a channel deviates by 1/sqrt(hw) of itself and by the offset: 0.0005 and 0.1.
    1200 draws know their deviation to 2 % (one standard deviation)."""
    shape = (4, 32, 64)
    plain, moved = (draw_noise(shape, range(300), 5, offset=x) for x in (0.0, 0.1))
    assert float(plain.mean(dim=(2, 3)).std()) < 0.03
    assert float(moved.mean(dim=(2, 3)).std()) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(draw_noise(shape, [7], 5), plain[7:8])


def test_noise_says_nothing_about_its_timestep() -> None:
    """Were both of one generator, the first number of a sample would decide its timestep and how
    large two of the noise's values are together. Five standard deviations of 2000 draws."""
    t = draw_timesteps(range(2000), 3, 1000, "cubic").double()
    noise = draw_noise((1, 4, 8), range(2000), 3).flatten(1).double()
    pairs = noise[:, :, None] ** 2 + noise[:, None] ** 2
    t, pairs = t - t.mean(), pairs - pairs.mean(dim=0)
    correlation = (t[:, None, None] * pairs).mean(dim=0) / (t.std() * pairs.std(dim=0))
    assert float(correlation.abs().max()) < 5 / 2000**0.5


@pytest.mark.parametrize("cubic", [False, True])
def test_timesteps_have_the_named_distribution(cubic: bool) -> None:
    t = draw_timesteps(range(2000), 3, 100, "cubic" if cubic else "uniform")
    assert int(t.min()) >= 0 and int(t.max()) == 99
    late = float((t >= 50).float().mean())
    # t = (1 - u^3) T is late when u^3 <= 1/2; three standard deviations of 2000 draws are 0.034.
    assert abs(late - (0.5 ** (1 / 3) if cubic else 0.5)) < 0.034
