"""Cutting a plain background: what is kept of drawn subjects, and which pictures stay whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.subject.background import PLAIN_SHARE, _open_runs, cut_background
from anystory_core.subject.preprocess import cut_out, prepare_views, views_of

from .drawn import SUBJECTS, Canvas, busy, drawn, overlap, snowman, spread, white_sleeves

CONFIG = AnyStoryConfig.mini()
LEAST = 0.95
CUT = "lain background was cut away"
WHOLE = "whole picture is taken as the subject"
CREAM = (240, 235, 225)


def guessed(picture: Tensor) -> Tensor:
    """The mask of a picture; all of it where nothing is cut."""
    found = cut_background(picture)
    return torch.ones(picture.shape[:2]) if found is None else found


@pytest.mark.parametrize("background", ["white", CREAM], ids=["white", "cream"])
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda f: f.__name__)
def test_the_subject_is_kept_whole(subject: Callable[[Canvas], None], background: Any) -> None:
    picture, mask = drawn(subject, background)
    assert overlap(guessed(picture), mask) >= LEAST


@pytest.mark.parametrize(("side", "jpeg"), [(96, None), (512, None), (256, 80)])
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda f: f.__name__)
def test_small_large_and_compressed(
    subject: Callable[[Canvas], None], side: int, jpeg: int | None
) -> None:
    picture, mask = drawn(subject, side=side, jpeg=jpeg)
    assert overlap(guessed(picture), mask) >= LEAST


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda f: f.__name__)
def test_nothing_is_cut_inside(subject: Callable[[Canvas], None]) -> None:
    """White eyes and shirts: no pixel two away from the outline is lost."""
    picture, mask = drawn(subject)
    inner = mask.float()[None]
    inner = 1 - torch.nn.functional.max_pool2d(1 - inner, 5, 1, 2)[0]
    assert torch.count_nonzero(inner * (1 - guessed(picture))) == 0


@pytest.mark.parametrize("subject", (spread, white_sleeves), ids=lambda f: f.__name__)
def test_it_does_not_matter_how_the_picture_lies(subject: Callable[[Canvas], None]) -> None:
    picture, _ = drawn(subject)
    wanted = guessed(picture)
    for turns in range(1, 4):
        turned = torch.rot90(picture, turns).contiguous()
        assert torch.equal(guessed(turned), torch.rot90(wanted, turns))
    assert torch.equal(guessed(picture.flip(1)), wanted.flip(1))


def sides_with(shares: tuple[float, ...], colours: tuple[float, ...] = (1.0,) * 4) -> Tensor:
    """A dark picture (100,100,3) whose sides, top first, clockwise, have their colour on so much of
    their length."""
    picture = torch.full((100, 100, 3), 0.3)
    for turn, (share, colour) in enumerate(zip(shares, colours, strict=True)):
        turned = torch.rot90(picture, turn)
        length = round(100 * share)
        turned[:3, 50 - length // 2 : 50 - length // 2 + length] = colour
        picture = torch.rot90(turned, -turn)
    return picture


def test_how_many_sides_must_be_plain() -> None:
    """Two of one colour, each on at least PLAIN_SHARE of its length."""
    assert PLAIN_SHARE == 0.8
    for shares, cut in (
        ((1, 1, 1, 1), True),
        ((1, 1, 1, 0), True),
        ((1, 1, 0, 0), True),
        ((1, 0, 1, 0), True),
        ((0.82, 0, 0.82, 0), True),
        ((0.82, 0, 0.78, 0), False),
    ):
        picture = sides_with(shares)
        # The dark colour must not be plain, too.
        picture[picture < 0.9] = torch.linspace(0.1, 0.8, int((picture < 0.9).sum()))
        assert (cut_background(picture) is not None) == cut, shares


def test_plain_sides_have_one_colour() -> None:
    noise = torch.linspace(0.1, 0.5, 100)[:, None, None].expand(100, 100, 3)

    def picture(top: float, bottom: float) -> Tensor:
        made = noise.clone()
        made[:3], made[-3:] = top, bottom
        return made

    assert cut_background(picture(0.9, 0.95)) is not None
    assert cut_background(picture(0.85, 0.95)) is None


def test_a_side_may_vary_a_little_and_no_more() -> None:
    _, mask = drawn(snowman)
    for spread_, cut in ((0.025, True), (0.035, False)):
        rough = torch.where(torch.arange(256) % 2 == 0, 0.8 - spread_, 0.8 + spread_)
        picture = rough[:, None, None] + rough[None, :, None] - 0.8
        picture = torch.where(mask[..., None], torch.tensor(0.2), picture.expand(-1, -1, 3))
        assert (cut_background(picture.contiguous()) is not None) == cut


def test_a_busy_a_blank_and_a_tiny_picture_are_left_alone() -> None:
    assert cut_background(busy()) is None
    assert cut_background(torch.full((40, 50, 3), 0.7)) is None
    assert cut_background(torch.ones(1, 1, 3)) is None


@pytest.mark.parametrize(
    ("side", "starts"),
    [
        ("b20 s2 b30 s2 b46", [0, 54]),  # a shirt between two outlines
        ("b20 s10 b30 s10 b30", [0, 30, 70]),  # a gap between legs
        ("b20 s2 b30 s10 b38", [0, 62]),  # one of the two is an outline
        ("b20 s10 b30 s2 b38", [0, 62]),
        ("b20 s3 b30 s3 b44", [0, 56]),  # 3 % of the side is thin yet
        ("b20 s4 b30 s4 b42", [0, 24, 58]),
        ("s5 b30 s10 b50 s5", [5, 45]),  # what lies at a corner has one neighbour
        ("s5 b30 s2 b58 s5", []),
        ("s5 b95", [5]),
        ("b95 s5", [0]),
        ("b5 s2 b6 s3 b4", [0, 16]),  # on a short side two pixels are thin
        ("b5 s3 b4 s3 b5", [0, 8, 15]),
        ("b10", [0]),
        ("s10", []),
    ],
)
def test_where_a_side_is_open(side: str, starts: list[int]) -> None:
    """Runs of background (b) and of the subject (s) along a side."""
    runs = [(run[0] == "b", int(run[1:])) for run in side.split()]
    alike = np.concatenate([np.full(length, value) for value, length in runs])
    assert list(_open_runs(alike)) == starts


def test_thin_parts_that_lie_aslant_are_kept() -> None:
    """On a ground whose channels differ."""
    picture = torch.tensor([0.2, 0.5, 0.9]).expand(100, 100, 3).clone()
    picture[30:70, 30:70] = 0
    tail = torch.arange(12)
    picture[70 + tail, 70 + tail] = 0
    found = guessed(picture)
    assert torch.equal(found, (picture.sum(dim=-1) == 0).float())


def test_dust_is_no_subject() -> None:
    """A crop goes around all that is left, so a speck would make the subject small."""
    picture, mask = drawn(snowman)
    picture[5, 5], picture[250, 3:5] = 0.0, 0.5
    found = guessed(picture)
    assert found[5, 5] == 0 and torch.count_nonzero(found[250]) == 0
    assert overlap(found, mask) >= LEAST


def test_a_small_part_apart_is_kept() -> None:
    picture, mask = drawn(snowman)
    picture[30:40, 220:230], mask[30:40, 220:230] = 0.2, True
    assert overlap(guessed(picture), mask) >= LEAST
    assert float(guessed(picture)[30:40, 220:230].mean()) == 1


def test_each_picture_of_a_batch_is_judged_alone() -> None:
    picture, mask = drawn(snowman)
    views = prepare_views(torch.stack((picture, busy(), picture)), None, CONFIG)
    alone = prepare_views(picture[None], None, CONFIG)
    assert torch.equal(views.mask[0], alone.mask[0]) and torch.equal(views.mask[2], alone.mask[0])
    assert float(views.mask[1, 0].mean()) > 0.9  # the whole square, less the margin of its crop
    assert len(views.notes) == 2
    assert views.notes[0].startswith("Pictures 1, 3: the ") and CUT in views.notes[0]
    assert views.notes[1].startswith("Picture 2: the ") and WHOLE in views.notes[1]
    assert (
        len(alone.notes) == 1 and alone.notes[0].startswith("The plain") and CUT in alone.notes[0]
    )
    (whole,) = prepare_views(busy()[None], None, CONFIG).notes
    assert whole.startswith("The whole") and WHOLE in whole


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda f: f.__name__)
def test_training_data_without_masks_is_cut_alike(subject: Callable[[Canvas], None]) -> None:
    picture, mask = drawn(subject)
    views = views_of([cut_out(picture, None)], CONFIG)
    assert torch.equal(views.vae, prepare_views(picture[None], None, CONFIG).vae)
    wanted = views_of([cut_out(picture, mask.float())], CONFIG)
    assert overlap(views.mask[0, 0], wanted.mask[0, 0] > 0.5) >= LEAST


def test_the_picture_is_not_changed() -> None:
    picture, _ = drawn(snowman)
    before = picture.clone()
    cut_background(picture)
    assert torch.equal(picture, before)
    assert np.array_equal(guessed(picture), guessed(picture))
