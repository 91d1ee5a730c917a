"""Maps of one pass -> masks, against loops over pixels."""

from __future__ import annotations

import pytest
import torch

from anystory_core.errors import RoutingError
from anystory_core.routing import segment
from anystory_core.routing.record import LevelRecord


def step(grids: list[tuple[int, int]], rows: int, candidates: int, seed: int = 0) -> LevelRecord:
    generator = torch.Generator().manual_seed(seed)
    record = LevelRecord(1.0, (True,) * (candidates - 1))
    for index, grid in enumerate(grids, 1):
        logits = torch.randn(rows, candidates, grid[0] * grid[1], generator=generator)
        record.soft[index], record.grids[index] = logits.softmax(dim=1), grid
    return record


def test_the_mean_over_blocks_rows_and_sizes() -> None:
    record = step([(4, 6), (4, 6), (2, 3), (8, 12)], rows=3, candidates=3)
    found = segment.mean_maps(record, (4, 6))
    wanted = torch.zeros(3, 4, 6, dtype=torch.float64)
    for index, soft in record.soft.items():
        height, width = record.grids[index]
        for row in soft.double():
            grid = row.reshape(1, 3, height, width)
            if height > 4:
                grid = grid.reshape(1, 3, 4, 2, 6, 2).mean(dim=(3, 5))
            elif height < 4:
                grid = torch.nn.functional.interpolate(grid, (4, 6), mode="bilinear")
            wanted += grid[0] / 12
    assert torch.allclose(found.double(), wanted, atol=1e-6)  # float32 sums of 12 maps
    assert torch.allclose(found.sum(dim=0), torch.ones(4, 6), atol=1e-6)


def test_nothing_recorded() -> None:
    with pytest.raises(RoutingError, match="no routes were recorded"):
        segment.mean_maps(LevelRecord(1.0, (False,)), (4, 4))


def test_masks_are_disjoint_and_follow_the_largest() -> None:
    maps = torch.zeros(3, 2, 2)
    maps[0, 0, 0] = maps[1, 1, 1] = maps[2, 0, 1] = maps[2, 1, 0] = 1
    masks = segment.masks_of(maps, (16, 16))
    assert masks.shape == (2, 16, 16) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert float((masks[0] * masks[1]).sum()) == 0
    assert masks[0, 0, 0] == 1 and masks[1, 15, 15] == 1 and masks[:, 0, 15].sum() == 0


def test_outlines_lie_between_the_centres_of_tokens() -> None:
    maps = torch.eye(3)[:, None]  # three tokens in a row, one a candidate
    masks = segment.masks_of(maps, (4, 24))
    for i, mask in enumerate(masks):
        wanted = (torch.arange(24) // 8 == i).float()
        assert torch.equal(mask, wanted.expand(4, 24))


def test_iou_against_sets() -> None:
    half = torch.full((1, 2, 2), 0.5)  # no place is half found
    assert segment.iou(half, torch.ones(1, 2, 2)) == segment.iou(torch.ones(1, 2, 2), half) == (0,)
    generator = torch.Generator().manual_seed(1)
    found, true = (torch.rand(4, 9, 7, generator=generator) > 0.5 for _ in range(2))
    found[3] = true[3] = False
    for i, value in enumerate(segment.iou(found.float(), true.float())):
        a = {tuple(p) for p in found[i].nonzero().tolist()}
        b = {tuple(p) for p in true[i].nonzero().tolist()}
        assert value == (len(a & b) / len(a | b) if a | b else 1)


def test_the_ceiling_is_one_on_the_masks_own_grid_and_less_on_a_coarser_one() -> None:
    true = torch.zeros(2, 16, 16)
    true[0, 2:9, 1:6], true[1, 5:15, 8:15] = 1, 1
    assert segment.ceiling(true, (16, 16)) == (1.0, 1.0)
    coarse = segment.ceiling(true, (8, 8))
    assert all(0.5 < value < 1 for value in coarse)
    tall = torch.zeros(1, 8, 4)
    tall[:, 1:7, :3] = 1
    assert segment.ceiling(tall, (8, 4)) == (1.0,)
    one = torch.zeros(1, 8, 8)
    one[0, 0, 0] = 1  # a quarter of a token: the nearest place would be all of it
    assert segment.ceiling(one, (4, 4)) == (0.0,)


def test_noises_depend_on_the_seed_alone() -> None:
    one, two = segment.noises((4, 3, 5), 3, 9), segment.noises((4, 3, 5), 3, 9)
    assert one.shape == (3, 4, 3, 5) and torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, segment.noises((4, 3, 5), 3, 10))
