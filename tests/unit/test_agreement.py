"""Blocks that agree: against a transcription, and what must not change."""

from __future__ import annotations

import math

import naive
import pytest
import torch
from calls import SITES, World, maps_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anystory_core.injection.call import Shown
from anystory_core.injection.rows import Rows
from anystory_core.routing.agreement import SIDE, Agreement


def maps(grid: tuple[int, int], candidates: int = 3, rows: int = 2, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, candidates, math.prod(grid), generator=g, dtype=torch.float64)
    return logits.softmax(dim=1)


def naive_scores(mean: Tensor, grid: tuple[int, int]) -> Tensor:
    """(C,h*w) of one row -> S (N,h*w), place by place as the module's equations say."""
    places = [divmod(u, grid[1]) for u in range(math.prod(grid))]
    subjects = range(mean.shape[0] - 1)
    logs = [[math.log(max(float(x), 1e-4)) for x in row] for row in mean[:-1]]
    w = [1 - float(mean[-1, u]) for u in range(len(places))]
    for u in range(len(places)):
        if sum(float(mean[i, u]) > 0 for i in subjects) < 2:
            w[u] = 0.0
    ahead = [sum(a * b for a, b in zip(w, logs[i], strict=True)) / sum(w) for i in subjects]
    out = torch.zeros(len(subjects), len(places), dtype=torch.float64)
    for u, (y, x) in enumerate(places):
        g = [math.exp(-((y - b) ** 2 + (x - a) ** 2) / (2 * 2.0**2)) for b, a in places]
        for i in subjects:
            near = sum(g[v] * w[v] * logs[i][v] for v in range(len(places)))
            near /= sum(g[v] * w[v] for v in range(len(places)))
            out[i, u] = near + min(max(ahead) - ahead[i], 2.0)
    return out


@settings(max_examples=15, deadline=None)
@given(
    grid=st.sampled_from([(16, 16), (8, 16), (16, 11)]),
    candidates=st.integers(3, 5),
    seed=st.integers(0, 1000),
)
def test_two_blocks_against_the_equations(
    grid: tuple[int, int], candidates: int, seed: int
) -> None:
    """Grids whose longer side is the module's own, so that nothing is resized. In the first row a
    subject is too far ahead to be caught up with, in the second some places have one subject, which
    has nobody to agree with there."""
    first, second = (maps(grid, candidates, seed=seed + k) for k in (0, 1))
    alone = torch.rand(math.prod(grid), generator=torch.Generator().manual_seed(seed)) < 0.2
    for block in (first, second):
        block[0, 0] *= 30
        block[1, -1] *= 20  # so that all of its subjects are far behind the first row's
        block[1, 1:-1, alone] = 0
        block /= block.sum(dim=1, keepdim=True)
    agreement = Agreement()
    agreement.settle(1, first, grid)
    settled = agreement.settle(2, second, grid)
    assert torch.allclose(settled[:, -1], second[:, -1])
    for row in (0, 1):
        scores = naive_scores((first[row] + second[row]) / 2, grid)
        scores = scores.masked_fill(second[row, :-1] == 0, -math.inf)
        wanted = (8 * scores).softmax(dim=0) * second[row, :-1].sum(dim=0)
        assert torch.allclose(settled[row, :-1], wanted, atol=1e-9)


def test_blocks_of_other_sizes_meet_on_one_grid() -> None:
    large, small = maps((24, 32)), maps((6, 8), seed=1)
    agreement = Agreement()
    agreement.settle(1, large, (24, 32))
    settled = agreement.settle(2, small, (6, 8))
    shrunk = large.reshape(2, 3, 12, 2, SIDE, 2).mean(dim=(3, 5))
    grown = small.reshape(2, 3, 6, 8).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    mean = (shrunk + grown).flatten(2) / 2
    for row in range(2):
        scores = naive_scores(mean[row], (12, SIDE)).reshape(2, 6, 2, 8, 2)
        wanted = (8 * scores.mean(dim=(2, 4)).flatten(1)).softmax(dim=0) * small[row, :-1].sum(0)
        assert torch.allclose(settled[row, :-1], wanted, atol=1e-9)


def test_places_that_do_not_divide_are_shared_by_area() -> None:
    """832x1216: 52x76 and 26x38 tokens on a grid of 11x16. A map that is the same everywhere stays
    so, and no place counts twice."""
    level = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)[None, :, None]
    agreement = Agreement()
    for index, grid in enumerate(((52, 76), (26, 38)), 1):
        settled = agreement.settle(index, level.expand(1, 3, math.prod(grid)), grid)
        assert torch.allclose(settled, settled[..., :1])
    one = torch.zeros(1, 1, 26, 38, dtype=torch.float64)
    one[0, 0, 3, 5] = 1
    seen = agreement._gathered(one, (26, 38))  # pyright: ignore[reportPrivateUsage]
    assert seen.shape == (1, 1, 11, 16)
    assert float(seen.sum()) == pytest.approx(11 * 16 / (26 * 38))


@pytest.mark.parametrize("grid", [(16, 16), (5, 9), (64, 48), (1, 1)])
def test_it_is_still_a_routing_map(grid: tuple[int, int]) -> None:
    given_maps = maps(grid, candidates=4).float()
    settled = Agreement().settle(1, given_maps, grid)
    assert settled.shape == given_maps.shape and settled.dtype == torch.float32
    assert float(settled.min()) >= 0
    assert torch.allclose(settled.sum(dim=1), torch.ones(2, math.prod(grid)), atol=1e-5)


def test_one_subject_changes_nothing() -> None:
    given_maps = maps((8, 8), candidates=2)
    assert torch.allclose(Agreement().settle(1, given_maps, (8, 8)), given_maps)


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
    route = Agreement().settle(1, before, grid).argmax(dim=1).reshape(grid)
    left, right = route[4:12, 1:6], route[4:12, 10:15]
    assert bool((left == 0).all()) and bool((right == 1).all())
    assert int((route != 2).sum()) == left.numel() + right.numel()


@pytest.mark.parametrize("third", [0.0, 1e-5])
def test_a_subject_that_is_nowhere_does_not_matter(third: float) -> None:
    two = two_things()
    three = torch.cat((two[:, :2], torch.full_like(two[:, :1], third), two[:, 2:]), dim=1)
    with_it, without = Agreement().settle(1, three, (16, 16)), Agreement().settle(1, two, (16, 16))
    assert torch.allclose(with_it[:, [0, 1, 3]], without, atol=1e-4)


def test_a_block_that_runs_again_answers_the_same() -> None:
    """As under activation checkpointing, when all the others have run."""
    agreement, blocks = Agreement(), [maps((8, 8), seed=n) for n in range(4)]
    first = [agreement.settle(n, block, (8, 8)) for n, block in enumerate(blocks, 1)]
    for n in (3, 1):
        assert torch.equal(agreement.settle(n, blocks[n - 1], (8, 8)), first[n - 1])


def test_half_precision_around_it_changes_nothing() -> None:
    given_maps = maps((16, 16)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Agreement().settle(1, given_maps, (16, 16))
    assert torch.equal(inside, Agreement().settle(1, given_maps, (16, 16)))


def test_what_is_certain_stays() -> None:
    """One thing, surely subject 1 in all of its places though not equally: it is not shared out."""
    before = two_things()
    share = torch.where(torch.arange(16) < 8, 0.95, 0.9).expand(16, 16).flatten()
    before[0, 0], before[0, 1] = 0.9 * share, 0.9 * (1 - share)
    before[0, :2, before[0, 2] > 0.5] = 0.02
    route, grid = Agreement().settle(1, before, (16, 16)).argmax(dim=1), (16, 16)
    assert set(route.unique().tolist()) == {0, 2}
    assert torch.equal(route.reshape(grid), before.argmax(dim=1).reshape(grid))


def test_rows_and_the_order_of_subjects_do_not_matter() -> None:
    both = torch.cat((two_things(), maps((16, 16), rows=1).float()))
    settled = Agreement().settle(1, both, (16, 16))
    for row in (0, 1):
        alone = Agreement().settle(1, both[row : row + 1], (16, 16))
        assert torch.allclose(settled[row], alone[0], atol=1e-6)
    turned = Agreement().settle(1, both[:, [1, 0, 2]], (16, 16))
    assert torch.allclose(turned, settled[:, [1, 0, 2]], atol=1e-6)


def test_what_a_block_forbids_stays_forbidden() -> None:
    given_maps = maps((16, 16))
    given_maps[:, 0, :128] = 0
    given_maps[:, :2, 128:136] = 0
    given_maps[:, 2, 128:136] = 1
    # Where the others say 1 and the block allows 2 alone, it is 2's with all that is a subject's.
    given_maps[:, 0, 200:], given_maps[:, 1, 200:], given_maps[:, 2, 200:] = 0.98, 0.01, 0.01
    given_maps[:, 0, 230], given_maps[:, 1, 230], given_maps[:, 2, 230] = 0, 0.99, 0.01
    settled = Agreement().settle(1, given_maps, (16, 16))
    assert torch.allclose(settled[:, 1, 230], given_maps[:, 1, 230])
    assert not settled[:, 0, :128].any() and bool((settled[:, 2, 128:136] == 1).all())
    assert torch.allclose(settled.sum(dim=1), given_maps.sum(dim=1), atol=1e-9)


def test_blocks_agree_in_rows_that_mean_the_whole_picture() -> None:
    """Routes are those of an Agreement over the pass; a row that is apart has its block's own,
    whatever it is batched with; and every row has what it has alone."""
    world = World()
    agreed = world.call(world.run(agree=True), Rows((0, 1, 2)), shown=Shown(apart=(1,)))
    out = world.forward(agreed)
    alone = world.call(world.run(), Rows((0, 1, 2)))
    world.forward(alone)
    agreement, moved = Agreement(), 0
    for index, soft in maps_of(alone).items():
        wanted = soft.maps.clone()
        wanted[[0, 2]] = agreement.settle(index, soft.maps[[0, 2]], soft.grid)
        assert torch.equal(maps_of(agreed)[index].maps, wanted)
        moved += int((wanted.argmax(dim=1) != soft.maps.argmax(dim=1)).sum())
    assert moved
    for row, apart in ((0, ()), (1, (1,))):
        call = world.call(world.run(agree=True), Rows((row,)), shown=Shown(apart=apart))
        for index, pair in world.forward(call).items():
            for a, b in zip(pair, out[index], strict=True):
                assert torch.allclose(a[row], b[row], atol=1e-9)


@pytest.mark.parametrize("active", [(True, False), (False, True), (True,)])
def test_a_subject_that_acts_alone_decides_alone(active: tuple[bool, ...]) -> None:
    world = World(subjects=len(active))
    calls = [
        world.call(world.run(agree=agree), Rows((0, 1, 2)), factors=active)
        for agree in (True, False)
    ]
    first, second = (world.forward(call) for call in calls)
    for index in first:
        for a, b in zip(first[index], second[index], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("active", [(True, False), (False, True), (True,)])
def test_one_that_acts_alone_has_every_place_in_nothing_but_noise(active: tuple[bool, ...]) -> None:
    """In rows that mean the whole picture; with agreement off the router is asked."""
    world, subject = World(subjects=len(active)), active.index(True)
    shown = Shown(blank=True, apart=(1,))
    begun, off = (
        world.call(world.run(agree=agree), Rows((0, 1, 2)), factors=active, shown=shown)
        for agree in (True, False)
    )
    later = world.call(world.run(agree=True), Rows((0, 1, 2)), factors=active)
    drawn = [world.forward(call) for call in (begun, off, later)]
    for index in drawn[0]:
        whole = maps_of(begun)[index].maps[[0, 2]]
        assert torch.equal(whole.argmax(dim=1), torch.full_like(whole[:, 0], subject).long())
        assert bool((whole.sum(dim=1) == 1).all()) and bool((whole.amax(dim=1) == 1).all())
        routed = maps_of(off)[index].maps
        assert torch.equal(maps_of(begun)[index].maps[1], routed[1])
        assert torch.equal(maps_of(later)[index].maps, routed)
        assert not torch.equal(maps_of(begun)[index].maps, routed)
        for a, b in zip(drawn[1][index], drawn[2][index], strict=True):
            assert torch.equal(a, b)
    # The outputs are those of a subject that is routed everywhere: Eq. 5 and 6 without a router.
    site, alone = SITES[-1], drawn[0][SITES[-1].index]
    q1, k1, v1, _, q2, text = world.hidden[site.index]
    conditions = world.conditions[site.index - 1]
    clip, reference = conditions.clip[subject], conditions.reference[subject]
    assert clip is not None and reference is not None
    own = naive.dense_attention(q2[:1], clip.k, clip.v, site.heads)
    assert torch.allclose(alone[1][:1], text[:1] + world.eta[subject] * own, atol=1e-9)
    bias = torch.zeros(1, 1, k1.shape[1] + reference.k.shape[1], dtype=torch.float64)
    bias[..., k1.shape[1] :] = world.gamma[subject]
    keys = torch.cat((k1[:1], reference.k), dim=1)
    values = torch.cat((v1[:1], reference.v), dim=1)
    wanted = naive.dense_attention(q1[:1], keys, values, site.heads, bias)
    assert torch.allclose(alone[0][:1], wanted, atol=1e-9)
