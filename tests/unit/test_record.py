"""Routes filed by noise level and by row, whatever the sampler calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.errors import RoutingError
from anystory_core.routing.record import RoutingRecord

SITES = build_sites(AnyStoryConfig.mini().unet)
GRID = (2, 3)


def new(*schedule: float, rows: int = 1, keep_soft: bool = False) -> RoutingRecord:
    return RoutingRecord(("fox", "owl"), SITES, schedule, rows, keep_soft)


def call(record: RoutingRecord, sigma: float, rows: tuple[int, ...] = (0,), id_: int = 0) -> None:
    """One call of the U-Net that routes everything of these rows to one region."""
    ids = torch.full((len(rows), 6), id_, dtype=torch.uint8)
    soft = torch.nn.functional.one_hot(ids.long(), 3).movedim(-1, 1).float()
    record.call(sigma, (True, True), rows).record(1, ids, GRID, soft)


def regions(record: RoutingRecord, row: int) -> list[int | None]:
    """The region that each level gives a row; None: not recorded."""
    maps: list[Tensor | None] = [level.map(1, row) for level in record.levels]
    return [None if ids is None else int(ids.unique()) for ids in maps]


def test_calls_between_the_steps_do_not_number_them() -> None:
    """Two calls a step, the second one below the next step's level, as in dpm_2."""
    record = new(8.0, 4.0, 2.0, 0.0)
    for sigma in (8.0, 6.0, 4.0, 3.0, 2.0):
        call(record, sigma)
    assert [level.step for level in record.levels] == [0, 0, 1, 1, 2]
    assert record.steps == 3


def test_a_skipped_step_keeps_its_number() -> None:
    record = new(8.0, 4.0, 2.0, 1.0, 0.0)
    for sigma in (8.0, 1.0):
        call(record, sigma)
    assert [level.step for level in record.levels] == [0, 3]
    assert record.steps == 4


def test_the_last_call_at_a_level_counts() -> None:
    """heun's second call is at the next step's level; that step's own call comes after it. Samplers
    that compute with log sigma come back to a level up to rounding."""
    record = new(8.0, 4.0, 0.0)
    call(record, 8.0, id_=0)
    call(record, 4.0, id_=1)
    call(record, 4.0 * (1 + 1e-6), id_=2)
    assert regions(record, 0) == [0, 2]


def test_levels_are_in_order_whatever_the_order_of_calls() -> None:
    record = new(8.0, 4.0, 2.0, 0.0)
    for sigma in (8.0, 2.0, 4.0):  # a sampler that goes back
        call(record, sigma)
    assert [level.sigma for level in record.levels] == [8.0, 4.0, 2.0]


@pytest.mark.parametrize("factor", [1.2, 0.45])
def test_a_level_beside_the_samplers_is_the_step_that_it_reports(factor: float) -> None:
    """Some samplers raise the noise before a step; some packs show the model less than there is."""
    schedule = (8.0, 4.0, 2.0, 1.0, 0.0)
    record = new(*schedule)
    for step, sigma in enumerate(schedule[:-1]):
        call(record, factor * sigma)
        record.sampled(step)
    assert [level.step for level in record.levels] == [0, 1, 2, 3]


def test_a_step_without_a_call_takes_no_other_ones_level() -> None:
    record = new(8.0, 4.0, 2.0, 1.0, 0.0)
    call(record, 8.0)
    for step in range(3):
        record.sampled(step)
    assert [level.step for level in record.levels] == [0]


def test_the_report_of_a_step_moves_no_level_of_another_one() -> None:
    """dpm_adaptive counts the steps that it accepts, which are not those of the schedule."""
    record = new(8.0, 4.0, 2.0, 1.0, 0.0)
    for reported, sigma in enumerate((8.0, 7.0, 6.5, 1.5)):
        call(record, sigma)
        record.sampled(reported)
    assert [level.step for level in record.levels][0] == 0
    assert record.levels[-1].step in (2, 3) and record.steps == 4


def test_rows_come_together_from_several_calls() -> None:
    """Context windows that overlap: the batch is shown in parts."""
    record = new(8.0, 4.0, 0.0, rows=5)
    call(record, 8.0, rows=(0, 1, 2), id_=0)
    call(record, 8.0, rows=(3, 4), id_=1)
    call(record, 4.0, rows=(4, 0), id_=2)
    assert [regions(record, row) for row in range(5)] == [
        [0, 2],
        [0, None],
        [0, None],
        [1, None],
        [1, 2],
    ]
    votes = record.votes(1)
    assert votes.shape == (3, *GRID) and torch.equal(votes[0], torch.ones(GRID))


def test_levels_at_which_no_place_was_known_have_no_vote() -> None:
    """Unless there are no others: then the subject was everywhere."""
    record = new(8.0, 4.0, 2.0, 0.0)
    for sigma in (8.0, 4.0):
        call(record, sigma, id_=0)
    for level in record.levels:
        level.everywhere = True
    assert torch.equal(record.votes(0)[0], torch.ones(GRID))
    call(record, 2.0, id_=2)
    assert torch.equal(record.votes(0)[2], torch.ones(GRID)) and record.shares(0) == (0, 0, 1)
    assert regions(record, 0) == [0, 0, 2]


def test_soft_maps_come_together_and_are_nobody_elses() -> None:
    record = new(8.0, 0.0, rows=2, keep_soft=True)
    ids = torch.zeros(2, 6, dtype=torch.uint8)
    given = torch.rand(2, 3, 6).half()
    before = given.clone()
    record.call(8.0, (True, True), (0, 1)).record(1, ids, GRID, given)
    record.call(8.0, (True, True), (1,)).record(1, ids[:1], GRID, torch.zeros(1, 3, 6))
    assert torch.equal(given, before)  # the model's own maps
    kept = record.levels[0].soft[1]
    assert torch.equal(kept[0], before[0]) and not kept[1].any()


def test_maps_of_another_grid_are_not_mixed() -> None:
    record = new(8.0, 0.0, rows=2, keep_soft=True)
    call(record, 8.0, rows=(0, 1))
    ids = torch.ones(1, 4, dtype=torch.uint8)
    record.call(8.0, (True, True), (1,)).record(1, ids, (2, 2), torch.ones(1, 3, 4))
    (level,) = record.levels
    assert level.map(1, 0) is None and level.map(1, 1) is not None
    assert torch.equal(level.soft[1], torch.stack((torch.zeros(3, 4), torch.ones(3, 4))).half())


@pytest.mark.parametrize("sigma", [14.0, 0.03])
def test_what_is_one_level(sigma: float) -> None:
    """Up to a ten-thousandth of it, whatever its size; steps begin at levels up to that, too."""
    record = new(2 * sigma, sigma, 0.0)
    for shown in (sigma, sigma * (1 - 0.9e-4), sigma * (1 + 0.9e-4)):
        call(record, shown)
    assert [level.step for level in record.levels] == [1]
    call(record, sigma * (1 - 1.2e-4))
    call(record, sigma * (1 + 1.2e-4))
    assert [level.step for level in record.levels] == [0, 1, 1]


def test_masks_have_the_outlines_of_enlarged_votes() -> None:
    """Bilinear between the centres of tokens: the border of equal votes lies between them."""
    record = new(8.0, 0.0)
    ids = torch.tensor([[0, 1, 1, 0, 2, 2]], dtype=torch.uint8)
    record.call(8.0, (True, True), (0,)).record(1, ids, GRID, torch.zeros(1, 3, 6))
    masks = record.masks(0, (16, 24))
    assert masks.shape == (2, 16, 24)
    borders = masks[:, [0, -1]]  # above and below the centres, where rows do not mix
    assert torch.equal(borders[0], (torch.arange(24) < 8).float().expand(2, 24))
    assert torch.equal(borders[1, 0], (torch.arange(24) >= 8).float()) and not borders[1, 1].any()


def test_a_level_outside_of_all_windows_is_blank() -> None:
    record = new(8.0, 4.0, 0.0)
    call(record, 8.0)
    record.call(4.0, (False, False))
    assert regions(record, 0) == [0, None]
    assert [level.active for level in record.levels] == [(True, True), (False, False)]
    assert record.levels_of(0) == record.levels[:1]


def test_what_is_not_there_is_refused() -> None:
    record = new(8.0, 4.0, 0.0, rows=3)
    with pytest.raises(RoutingError, match="no routes were recorded"):
        record.votes(0)
    call(record, 8.0, rows=(0, 1))
    with pytest.raises(RoutingError, match="batch_index: got 3, expected 0 to 2"):
        record.votes(3)
    with pytest.raises(RoutingError, match="no routes were recorded"):
        record.votes(2)
