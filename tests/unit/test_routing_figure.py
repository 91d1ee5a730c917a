"""Pictures of routes: tiles where they belong, blank windows."""

from __future__ import annotations

import itertools

import pytest
import torch
from routes import halves, record_of

from anystory_core.bases.flux.config import FluxConfig
from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.errors import RoutingError
from anystory_core.pictures.figure import MOST_PIXELS, figure, fitting, overlay
from anystory_core.pictures.palette import BACKGROUND_COLOUR, palette


def _has(picture: torch.Tensor, colour: tuple[int, int, int]) -> torch.Tensor:
    """(H,W) bool: pixels of exactly this colour."""
    return ((picture * 255).round() == torch.tensor(colour)).all(dim=-1)


def test_rows_are_subjects_and_columns_are_steps() -> None:
    record = record_of(AnyStoryConfig.mini(), halves(2), steps=4)
    one = figure(record, levels=[record.levels[0]])
    two = figure(record, levels=[record.levels[0], record.levels[3]])
    more = figure(record, levels=[record.levels[0]], background=True)
    assert two.shape[1] > one.shape[1] and two.shape[0] == one.shape[0]
    assert more.shape[0] > one.shape[0] and more.shape[1] == one.shape[1]
    first, second = (_has(one, colour) for colour in palette(2))
    assert int(first.nonzero()[:, 0].max()) < int(second.nonzero()[20:, 0].max())
    assert not bool(_has(one, BACKGROUND_COLOUR).any())


def test_a_tile_shows_the_blocks_own_region() -> None:
    """Subject 1 has the left half of every block: half of each tile's pixels, all 16 tiles."""
    record = record_of(AnyStoryConfig.mini(), halves(2), steps=1)
    tile = 40
    picture = figure(record, levels=[record.levels[0]], tile=tile)
    pixels = int(_has(picture, palette(2)[0]).sum())
    swatch = 11 * 11
    assert pixels == 16 * tile * tile // 2 + swatch


def test_flux_has_a_tile_for_each_of_57_blocks() -> None:
    record = record_of(FluxConfig(), halves(2), steps=1, size=(512, 512))
    assert len(record.blocks) == 57
    picture = figure(record, levels=[record.levels[0]], tile=32)
    pixels = int(_has(picture, palette(2)[0]).sum())
    assert pixels == 57 * 32 * 32 // 2 + 11 * 11


def test_a_subject_outside_its_window_is_blank() -> None:
    record = record_of(AnyStoryConfig.mini(), halves(2), steps=2)
    record.levels[1].active = (True, False)
    before = int(_has(figure(record, levels=[record.levels[0]]), palette(2)[1]).sum())
    after = int(_has(figure(record, levels=[record.levels[1]]), palette(2)[1]).sum())
    assert after == 11 * 11 < before


@pytest.mark.parametrize("size", [(1024, 1024), (832, 1216), (1016, 1016), (256, 1024)])
def test_every_shape_of_picture(size: tuple[int, int]) -> None:
    record = record_of(AnyStoryConfig.sdxl(), halves(2), steps=1, size=size)
    picture = figure(record, levels=[record.levels[0]], background=True)
    assert picture.ndim == 3 and picture.shape[2] == 3
    assert float(picture.min()) >= 0 and float(picture.max()) <= 1


def test_unknown_rows_and_records_without_routes_are_refused() -> None:
    record = record_of(AnyStoryConfig.mini(), halves(2), steps=2)
    with pytest.raises(RoutingError, match="batch_index: got 1, expected 0 to 0"):
        figure(record, levels=record.levels, row=1)
    with pytest.raises(RoutingError, match="no routes were recorded"):
        figure(record_of(AnyStoryConfig.mini(), halves(2), steps=0), levels=record.levels)


def test_many_steps_of_a_large_model_are_bounded() -> None:
    """SDXL at 1024 squared with four subjects: all 50 would be 25,340 x 1,792 pixels."""
    labels = ("fox", "owl", "bear", "elk")
    record = record_of(AnyStoryConfig.sdxl(), halves(4), labels=labels, steps=50, size=(1024, 1024))
    drawn = fitting(record, levels=record.levels)
    steps = [level.step for level in drawn]
    assert steps[0] == 0 and steps[-1] == 49 and 5 < len(steps) < 50
    gaps = {after - before for before, after in itertools.pairwise(steps)}
    assert max(gaps) - min(gaps) <= 1
    picture = figure(record, levels=record.levels)
    assert picture.shape[0] * picture.shape[1] <= MOST_PIXELS
    assert torch.equal(picture, figure(record, levels=drawn))
    # One more would not fit.
    wide = picture.shape[1] + (picture.shape[1] - 140) // len(drawn)
    assert picture.shape[0] * wide > MOST_PIXELS


def test_overlay_tints_each_subjects_own_part() -> None:
    record = record_of(AnyStoryConfig.mini(), halves(2), steps=2)
    picture = torch.full((256, 256, 3), 0.5)
    out = overlay(record, picture, opacity=0.5)
    assert out.shape[0] > 256 and out.shape[1] == 256  # the legend is below
    for column, colour in ((60, palette(2)[0]), (200, palette(2)[1])):
        expected = 0.25 + 0.5 * torch.tensor(colour) / 255
        assert torch.allclose(out[128, column], expected.float(), atol=1e-5)
    assert bool((picture == 0.5).all())  # the input is not written to


def test_overlay_leaves_the_background_as_it_is() -> None:
    def corner(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.where((y < 0.5) & (x < 0.5), 0, 1)

    record = record_of(AnyStoryConfig.mini(), corner, labels=("fox",), steps=1)
    picture = torch.rand(256, 256, 3, generator=torch.Generator().manual_seed(1))
    out = overlay(record, picture)
    assert torch.equal(out[160:256, :], picture[160:])
    assert not torch.equal(out[:100, :100], picture[:100, :100])
