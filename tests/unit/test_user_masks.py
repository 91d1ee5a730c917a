"""The user's masks: batches of them, and what leaves a subject without a place."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anystory_core.bases.base import Site
from anystory_core.errors import RoutingError, SubjectError
from anystory_core.routing.grids import Crop, SoftMaps
from anystory_core.routing.masks import (
    check_batch,
    check_counts,
    count_of,
    lost_subjects,
    mask_of,
)
from anystory_core.routing.sources import LearnedRoutes, MaskRoutes, SingleRoute
from anystory_core.subject.subject import EASINGS, SubjectOptions

LEFT = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).repeat(4, 1)
RIGHT = 1 - LEFT
SITE = cast(Site, None)  # masks are the same at every block


def whole(picture: int) -> Crop:
    return Crop(0, 0, 4, 4, 4, 4, picture)


def test_counts_of_masks() -> None:
    batch = torch.stack((LEFT, RIGHT, LEFT))
    assert (count_of(LEFT), count_of(LEFT[None]), count_of(batch)) == (1, 1, 3)
    assert torch.equal(mask_of(LEFT, 2), LEFT) and torch.equal(mask_of(LEFT[None], 2), LEFT)
    assert torch.equal(mask_of(batch, 0), LEFT) and torch.equal(mask_of(batch, 1), RIGHT)
    check_counts((LEFT, None, batch, LEFT[None], batch))
    with pytest.raises(RoutingError, match="one subject has 2 masks and another 3"):
        check_counts((batch, batch[:2]))
    check_batch((LEFT, None, batch, LEFT[None]), 3)
    with pytest.raises(RoutingError, match="subject 3 has 3 masks, the batch has 2 pictures"):
        check_batch((LEFT, None, batch), 2)
    with pytest.raises(RoutingError, match="subject 1 has 3 masks, the batch has 1 pictures"):
        check_batch((batch,), 1)


def test_each_row_takes_the_mask_that_its_crop_names() -> None:
    routes = MaskRoutes((torch.stack((LEFT, RIGHT, LEFT * 0)), RIGHT))
    assert routes.pictures == 3 and MaskRoutes((LEFT, RIGHT)).pictures == 1
    z = torch.zeros(4, 16, 2)
    crops = (whole(1), whole(0), whole(2), whole(1))
    ids = routes.maps(SITE, z, (4, 4), crops).maps.argmax(dim=1).reshape(4, 4, 4)
    first = [RIGHT, LEFT, 0 * LEFT, RIGHT]
    for found, mask in zip(ids, first, strict=True):
        wanted = torch.where(mask >= 0.5, 0, torch.where(RIGHT >= 0.5, 1, 2))
        assert torch.equal(found, wanted)
    part = Crop(0, 2, 4, 2, 4, 4, 1)  # the right half of the second picture
    half = routes.maps(SITE, z[:1, :8], (4, 2), (part,)).maps.argmax(dim=1)
    assert bool((half == 0).all())


def test_maps_are_confined_row_by_row() -> None:
    """Rows that see parts of pictures that have masks of their own; a place of which its subjects
    keep nothing is the background's, whole."""
    routes = MaskRoutes((torch.stack((LEFT, RIGHT)), 0.5 * LEFT))
    crops = (Crop(0, 0, 4, 2, 4, 4, 0), Crop(0, 1, 4, 2, 4, 4, 1), whole(1))
    grid = (4, 2)
    inside = torch.zeros(3, 2, 4, 2)
    inside[0] = 1  # the left half of the first picture: both masks, the second at 0.5
    inside[1, 0, :, 1] = 1  # the middle of the second picture
    inside[1, 1, :, 0] = 1
    inside[2, 0, :, 1] = 1
    inside[2, 1, :, 0] = 1
    given_maps = torch.rand(3, 3, 8, generator=torch.Generator().manual_seed(3)) + 0.1
    given_maps[1:, -1, 1::2] = 0  # where the second subject may not be
    given_maps[:, 0] = 0  # so that only the second subject has anything to lose
    wanted = given_maps.clone().reshape(3, 3, 4, 2)
    wanted[:, :2] *= inside
    wanted[:, 2][wanted.amax(dim=1) == 0] = 1
    for confine in (
        lambda soft: routes.confine(soft, crops),
        lambda soft: LearnedRoutes({}, 3, routes).resize(soft, grid, crops),
    ):
        soft = confine(SoftMaps(given_maps, grid))
        assert soft.grid == grid and torch.equal(soft.maps, wanted.flatten(2))
    allowed = routes.allowed(grid, crops, torch.device("cpu"))
    assert torch.equal(allowed[:, :2], inside.flatten(2).bool()) and bool(allowed[:, 2].all())
    assert torch.equal(
        routes.allowed(grid, (), torch.device("cpu"))[0, 0], LEFT[:, ::2].flatten() > 0
    )
    weights = inside.flatten(2)
    weights[:, 1] *= 0.5
    carried = routes.resize(SoftMaps(given_maps, (8, 4)), grid, crops)
    assert carried.grid == grid and torch.equal(carried.maps[:, :2], weights)
    assert torch.equal(carried.maps.sum(dim=1).clamp_min(1), 1 + weights[:, 1] * weights[:, 0])


def test_a_single_subject_has_every_place() -> None:
    soft = SingleRoute().maps(SITE, torch.zeros(3, 8, 2), (4, 2), ())
    assert soft.grid == (4, 2)
    assert torch.equal(soft.maps, torch.tensor([1.0, 0.0])[:, None].expand(3, 2, 8))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_crop_of_a_mask_is_every_pixel_that_it_touches(data: st.DataObject) -> None:
    """Of a mask of any size against the latent's, and one pixel at least."""
    full, size = ((data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))) for _ in "ab")
    begin = [data.draw(st.integers(0, side - 1)) for side in full]
    length = [data.draw(st.integers(1, f - b)) for f, b in zip(full, begin, strict=True)]
    crop = Crop(*begin, *length, *full)
    touched = [
        [r for r in range(n) if (r + 1) * f > b * n and r * f < (b + c) * n]
        for n, f, b, c in zip(size, full, begin, length, strict=True)
    ]
    mask = torch.arange(size[0] * size[1]).reshape(size)
    assert torch.equal(crop.narrow(mask), mask[touched[0]][:, touched[1]])
    beyond = Crop(*full, 1, 1, *full)
    assert beyond.narrow(mask).tolist() == [[int(mask[-1, -1])]]


@pytest.mark.parametrize("exclusive", [False, True])
def test_masks_that_are_empty_or_faint(exclusive: bool) -> None:
    masks = {"mask_1": LEFT, "mask_2": 0 * LEFT, "mask_5": 0.49 * RIGHT, "mask_6": RIGHT}
    lost = lost_subjects(masks, exclusive=exclusive)
    assert list(lost) == ["mask_2", "mask_5"]
    assert lost["mask_2"].startswith("mask_2 is empty")
    assert "mask_5 is nowhere above 0.5 (its highest value is 0.49)" in lost["mask_5"]
    assert lost_subjects({"mask_1": 0.5 * LEFT}, exclusive=exclusive) == {}


def over(first: Tensor, second: Tensor, *, exclusive: bool = True) -> dict[str, str]:
    return lost_subjects({"mask_1": first, "mask_2": second}, exclusive=exclusive)


def test_masks_under_others() -> None:
    assert list(over(LEFT, LEFT)) == ["mask_2"]
    assert over(LEFT, LEFT)["mask_2"].startswith("mask_2 lies wholly under mask_1")
    assert list(over(0.9 * LEFT, LEFT)) == ["mask_1"]
    assert over(LEFT, LEFT, exclusive=False) == {}
    assert over(LEFT, LEFT + 0.7 * RIGHT) == {}
    large = LEFT.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert list(over(large, LEFT)) == list(over(LEFT, large)) == ["mask_2"]
    three = {"mask_1": LEFT, "mask_2": RIGHT, "mask_3": RIGHT}
    lost = lost_subjects(three, exclusive=True)
    assert list(lost) == ["mask_3"] and "under mask_2" in lost["mask_3"]


def test_masks_of_several_sizes_meet_on_the_largest() -> None:
    """By the number of places, not by a side; the size of a batch is no side. A place that only the
    largest size has is one."""
    tall, wide = torch.full((9, 2), 0.8), torch.zeros(4, 6)
    wide[:, 0], wide[:, 1] = 0.6, 1
    assert over(tall, wide) == {}
    wide, tall = torch.full((2, 5), 0.8), torch.full((8, 4), 0.6)
    tall[1] = 1
    assert over(wide, tall) == {}
    between = torch.zeros(9, 2)
    between[1] = 1  # which the larger size passes over: not under another mask
    assert over(between, torch.ones(4, 6)) == {}
    batch = torch.zeros(30, 2, 2)
    batch[:, 0, 0] = 1
    assert over(batch, wide) == {} and list(over(batch, 0.5 * batch[0])) == ["mask_2"]
    fine = torch.ones(8, 8)
    fine[3, 3] = 0
    hole = torch.zeros(8, 8)
    hole[3, 3] = 1
    assert over(fine, hole) == {} and list(over(torch.ones(2, 2), hole)) == ["mask_2"]


def test_one_mask_alone_lies_under_nobody() -> None:
    half = 0.5 * LEFT
    assert lost_subjects({"mask_1": half}, exclusive=True) == {}


def test_a_place_in_one_picture_is_a_place() -> None:
    assert over(LEFT, torch.stack((LEFT, RIGHT))) == {}
    assert list(over(LEFT, torch.stack((LEFT, LEFT)))) == ["mask_2"]
    assert over(torch.stack((LEFT, RIGHT)), LEFT) == {}


@pytest.mark.parametrize(
    ("easing", "quarter"),
    [("linear", 0.25), ("ease in", 0.0625), ("ease out", 0.4375), ("ease in and out", 0.15625)],
)
def test_easings(easing: str, quarter: float) -> None:
    """Of t = 1/4: t, t^2, 1 - (1 - t)^2, 3 t^2 - 2 t^3."""
    curve = EASINGS[easing]
    assert [curve(t) for t in (0.0, 0.25, 1.0)] == [0.0, quarter, 1.0]
    options = SubjectOptions(at_start=2.0, at_end=0.5, easing=easing)
    assert options.factor(0.25) == pytest.approx(2.0 - 1.5 * quarter)
    assert not options.is_constant and SubjectOptions(easing=easing).is_constant
    assert not SubjectOptions(at_start=2.0).is_constant
    assert not SubjectOptions(at_end=2.0).is_constant
    assert not SubjectOptions(at_start=2.0, at_end=2.0).is_constant


def test_options_that_are_refused() -> None:
    for name in ("at_start", "at_end"):
        with pytest.raises(SubjectError, match=f"{name}: got -0.5, expected a number of 0 or more"):
            SubjectOptions(**{name: -0.5})
    with pytest.raises(SubjectError, match="easing: got 'no', expected one of .*ease in and out"):
        SubjectOptions(easing="no")
