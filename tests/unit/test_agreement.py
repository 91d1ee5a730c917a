"""Blocks that agree: against a transcription, and what must not change."""

from __future__ import annotations

import math

import pytest
import torch
from calls import World
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anystory_core.agreement import SIDE, Agreement
from anystory_core.conditioner import Rows
from anystory_core.routes import Crop, SoftMaps, resize_soft


def maps(grid: tuple[int, int], candidates: int = 3, rows: int = 2, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, candidates, math.prod(grid), generator=g, dtype=torch.float64)
    return logits.softmax(dim=1)


def naive_scores(mean: Tensor, grid: tuple[int, int]) -> Tensor:
    """(C,h*w) of one row -> (N,h*w), place by place as the module's equations say."""
    places = [divmod(u, grid[1]) for u in range(math.prod(grid))]
    subjects = range(mean.shape[0] - 1)
    w = [1 - float(mean[-1, u]) for u in range(len(places))]
    s: list[list[float]] = []
    for u in range(len(places)):
        logs = [math.log(max(float(mean[i, u]), 1e-4)) for i in subjects]
        s.append([x - sum(logs) / len(logs) for x in logs])
    out = torch.zeros(len(subjects), len(places), dtype=torch.float64)
    for u, (y, x) in enumerate(places):
        g = [math.exp(-((y - b) ** 2 + (x - a) ** 2) / (2 * 2.0**2)) for b, a in places]
        for i in subjects:
            near = sum(g[v] * w[v] * s[v][i] for v in range(len(places)))
            near /= sum(g[v] * w[v] for v in range(len(places)))
            everywhere = sum(w[v] * s[v][i] for v in range(len(places))) / sum(w)
            out[i, u] = near - min(1.0, max(-1.0, everywhere))
    return out


@settings(max_examples=15, deadline=None)
@given(
    grid=st.sampled_from([(16, 16), (8, 16), (16, 11)]),
    candidates=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
def test_two_blocks_against_the_equations(
    grid: tuple[int, int], candidates: int, seed: int
) -> None:
    """Grids whose longer side is the module's own, so that nothing is resized."""
    first, second = (maps(grid, candidates, rows=1, seed=seed + k) for k in (0, 1))
    agreement = Agreement()
    agreement.settle(first, grid)
    settled = agreement.settle(second, grid)
    shares = (8 * naive_scores((first[0] + second[0]) / 2, grid)).softmax(dim=0)
    assert torch.allclose(settled[0, -1], second[0, -1])
    wanted = shares * second[0, :-1].sum(dim=0)
    assert torch.allclose(settled[0, :-1], wanted, atol=1e-9)


def test_blocks_of_other_sizes_meet_on_one_grid() -> None:
    large, small = maps((24, 32)), maps((6, 8), seed=1)
    agreement = Agreement()
    agreement.settle(large, (24, 32))
    settled = agreement.settle(small, (6, 8))
    own = (12, SIDE)
    seen = [resize_soft(SoftMaps(m, g), own).maps for m, g in ((large, (24, 32)), (small, (6, 8)))]
    mean = (seen[0] + seen[1]) / 2
    for row in range(2):
        scores = resize_soft(SoftMaps(naive_scores(mean[row], own)[None], own), (6, 8)).maps[0]
        wanted = (8 * scores).softmax(dim=0) * small[row, :-1].sum(dim=0)
        assert torch.allclose(settled[row, :-1], wanted, atol=1e-9)


@pytest.mark.parametrize("grid", [(16, 16), (5, 9), (64, 48), (1, 1)])
def test_it_is_still_a_routing_map(grid: tuple[int, int]) -> None:
    given_maps = maps(grid, candidates=4).float()
    settled = Agreement().settle(given_maps, grid)
    assert settled.shape == given_maps.shape and settled.dtype == torch.float32
    assert float(settled.min()) >= 0
    assert torch.allclose(settled.sum(dim=1), torch.ones(2, math.prod(grid)), atol=1e-5)


def test_one_subject_changes_nothing() -> None:
    given_maps = maps((8, 8), candidates=2)
    assert torch.allclose(Agreement().settle(given_maps, (8, 8)), given_maps)


def two_things() -> Tensor:
    """Two things on the left and right; subject 1 is ahead in both, further in the left one."""
    picture = torch.full((3, 16, 16), 0.02)
    picture[2] = 0.96
    for columns, first in ((slice(1, 6), 0.7), (slice(10, 15), 0.5)):
        picture[0, 4:12, columns] = first
        picture[1, 4:12, columns] = 0.9 - first
        picture[2, 4:12, columns] = 0.1
    return picture.flatten(1)[None]


def test_no_subject_takes_every_place() -> None:
    before, grid = two_things(), (16, 16)
    assert set(before.argmax(dim=1).unique().tolist()) == {0, 2}
    route = Agreement().settle(before, grid).argmax(dim=1).reshape(grid)
    left, right = route[4:12, 1:6], route[4:12, 10:15]
    assert bool((left == 0).all()) and bool((right == 1).all())
    assert int((route != 2).sum()) == left.numel() + right.numel()


def test_what_is_certain_stays() -> None:
    """One thing, surely subject 1 in all of its places though not equally: it is not shared out."""
    before = two_things()
    share = torch.where(torch.arange(16) < 8, 0.95, 0.9).expand(16, 16).flatten()
    before[0, 0], before[0, 1] = 0.9 * share, 0.9 * (1 - share)
    before[0, :2, before[0, 2] > 0.5] = 0.02
    route, grid = Agreement().settle(before, (16, 16)).argmax(dim=1), (16, 16)
    assert set(route.unique().tolist()) == {0, 2}
    assert torch.equal(route.reshape(grid), before.argmax(dim=1).reshape(grid))


def test_rows_and_the_order_of_subjects_do_not_matter() -> None:
    both = torch.cat((two_things(), maps((16, 16), rows=1).float()))
    settled = Agreement().settle(both, (16, 16))
    for row in (0, 1):
        alone = Agreement().settle(both[row : row + 1], (16, 16))
        assert torch.allclose(settled[row], alone[0], atol=1e-6)
    turned = Agreement().settle(both[:, [1, 0, 2]], (16, 16))
    assert torch.allclose(turned, settled[:, [1, 0, 2]], atol=1e-6)


def test_what_a_block_forbids_stays_forbidden() -> None:
    given_maps = maps((16, 16))
    given_maps[:, 0, :128] = 0
    given_maps[:, :2, 128:136] = 0
    given_maps[:, 2, 128:136] = 1
    # Where the others say 1 and the block allows 2 alone, it is 2's with all that is a subject's.
    given_maps[:, 0, 200:], given_maps[:, 1, 200:], given_maps[:, 2, 200:] = 0.98, 0.01, 0.01
    given_maps[:, 0, 230], given_maps[:, 1, 230], given_maps[:, 2, 230] = 0, 0.99, 0.01
    settled = Agreement().settle(given_maps, (16, 16))
    assert torch.allclose(settled[:, 1, 230], given_maps[:, 1, 230])
    assert not settled[:, 0, :128].any() and bool((settled[:, 2, 128:136] == 1).all())
    assert torch.allclose(settled.sum(dim=1), given_maps.sum(dim=1), atol=1e-9)


def test_blocks_agree_in_rows_that_show_the_whole_picture() -> None:
    """Routes are those of an Agreement over the pass; a cropped row's are its block's own, whatever
    it is batched with; and every row has what it has alone."""
    world = World()
    crop = Crop(0, 0, 4, 6, 8, 6)
    agreed = world.call(world.run(agree=True), Rows((0, 1, 2)), crops=(None, crop, None))
    out = world.forward(agreed)
    alone = world.call(world.run(), Rows((0, 1, 2)))
    world.forward(alone)
    agreement, moved = Agreement(), 0
    for index, soft in alone.soft_maps.items():
        wanted = soft.maps.clone()
        wanted[[0, 2]] = agreement.settle(soft.maps[[0, 2]], soft.grid)
        assert torch.equal(agreed.soft_maps[index].maps, wanted)
        assert agreed.soft_maps[index].logits is not None
        moved += int((wanted.argmax(dim=1) != soft.maps.argmax(dim=1)).sum())
    assert moved
    for row, crops in ((0, ()), (1, (crop,) * 3)):
        call = world.call(world.run(agree=True), Rows((row,)), crops=crops)
        for index, pair in world.forward(call).items():
            for a, b in zip(pair, out[index], strict=True):
                assert torch.allclose(a[row], b[row], atol=1e-9)


def test_a_single_subject_has_nothing_to_agree_on() -> None:
    world = World(subjects=1)
    calls = [world.call(world.run(agree=agree), Rows((0, 1, 2))) for agree in (True, False)]
    first, second = (world.forward(call) for call in calls)
    for index in first:
        for a, b in zip(first[index], second[index], strict=True):
            assert torch.equal(a, b)
