"""Pictures of routes: tiles where they belong, blank windows."""

from __future__ import annotations

import pytest
import torch
from routes import halves, record_of

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.errors import RoutingError
from anystory_core.pictures.figure import figure, overlay
from anystory_core.pictures.palette import BACKGROUND_COLOUR, palette


def _has(picture: torch.Tensor, colour: tuple[int, int, int]) -> torch.Tensor:
    """(H,W) bool: pixels of exactly this colour."""
    return ((picture * 255).round() == torch.tensor(colour)).all(dim=-1)


def test_rows_are_subjects_and_columns_are_steps() -> None:
    record = record_of(AnyStoryConfig.mini(), halves(2), steps=4)
    one = figure(record, steps=[0])
    two = figure(record, steps=[0, 3])
    more = figure(record, steps=[0], background=True)
    assert two.shape[1] > one.shape[1] and two.shape[0] == one.shape[0]
    assert more.shape[0] > one.shape[0] and more.shape[1] == one.shape[1]
    first, second = (_has(one, colour) for colour in palette(2))
    assert int(first.nonzero()[:, 0].max()) < int(second.nonzero()[20:, 0].max())
    assert not bool(_has(one, BACKGROUND_COLOUR).any())


def test_a_tile_shows_the_blocks_own_region() -> None:
    """Subject 1 has the left half of every block: half of each tile's pixels, all 16 tiles."""
    record = record_of(AnyStoryConfig.mini(), halves(2), steps=1)
    tile = 40
    picture = figure(record, steps=[0], tile=tile)
    pixels = int(_has(picture, palette(2)[0]).sum())
    swatch = 11 * 11
    assert pixels == 16 * tile * tile // 2 + swatch


def test_a_subject_outside_its_window_is_blank() -> None:
    record = record_of(AnyStoryConfig.mini(), halves(2), steps=2)
    record.steps[1].active = (True, False)
    before = int(_has(figure(record, steps=[0]), palette(2)[1]).sum())
    after = int(_has(figure(record, steps=[1]), palette(2)[1]).sum())
    assert after == 11 * 11 < before


@pytest.mark.parametrize("size", [(1024, 1024), (832, 1216), (1016, 1016), (256, 1024)])
def test_every_shape_of_picture(size: tuple[int, int]) -> None:
    record = record_of(AnyStoryConfig.sdxl(), halves(2), steps=1, size=size)
    picture = figure(record, steps=[0], background=True)
    assert picture.ndim == 3 and picture.shape[2] == 3
    assert float(picture.min()) >= 0 and float(picture.max()) <= 1


def test_unknown_steps_and_rows_are_refused() -> None:
    record = record_of(AnyStoryConfig.mini(), halves(2), steps=2)
    with pytest.raises(RoutingError, match="expected 0 to 1"):
        figure(record, steps=[2])
    with pytest.raises(RoutingError, match="batch_index: got 1"):
        figure(record, steps=[0], row=1)
    with pytest.raises(RoutingError, match="no routes were recorded"):
        figure(record_of(AnyStoryConfig.mini(), halves(2), steps=0), steps=[0])


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
