"""Masks of a subject: what they show, what counts as none, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anystory_core.errors import SubjectError
from anystory_core.subject.masks import Found, MaskReading, find_subjects, notes_on

HEIGHT, WIDTH = 40, 60
BORDER_HINT = "covers most of the picture's border"


def picture(count: int = 1, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, HEIGHT, WIDTH, channels, generator=generator)


def on_white() -> Tensor:
    """A box that is not all of one colour, on white."""
    made = torch.ones(1, HEIGHT, WIDTH, 3)
    made[:, 10:26, 20:36] = picture()[:, 10:26, 20:36] * 0.5
    return made


def box() -> Tensor:
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 10:26, 20:36] = 1
    return mask


def find(image: Tensor, mask: Tensor | None = None, shows: str = "subject", **given: Any) -> Any:
    return find_subjects(image, mask, MaskReading(shows, **given))[1]


def is_box(found: Found) -> bool:
    return torch.equal(found.mask, box()[0])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("shows", "invert"), [("subject", False), ("background", True)])
def test_what_is_white(shows: str, invert: bool, turned: bool) -> None:
    mask = 1 - box() if turned else box()
    (found,) = find(picture(), mask, shows, invert=invert != turned)
    assert is_box(found) and found.said == ()


def test_auto_gives_the_border_to_the_background() -> None:
    for invert in (False, True):
        (found,) = find(picture(), box(), "auto", invert=invert)
        assert is_box(found) and "shows the subject" in found.said[0]
        (found,) = find(picture(), 1 - box(), "auto", invert=invert)
        assert is_box(found) and "shows the background" in found.said[0]


def test_auto_counts_the_border_and_nothing_else() -> None:
    """Of 2 x (40 + 60) = 200 pixels a subject may have up to half."""
    for columns, subject in ((0, True), (28, True), (32, False)):
        mask = torch.zeros(1, HEIGHT, WIDTH)
        mask[:, :, : columns + 1] = 1  # 40 pixels of the left side and 2 of each column
        share = (40 + 2 * (columns + 1)) / 200
        assert (share <= 0.5) == subject
        (found,) = find(picture(), mask, "auto")
        assert torch.equal(found.mask, mask[0] if subject else 1 - mask[0])


def test_auto_keeps_a_mask_that_covers_everything() -> None:
    (found,) = find(picture(), torch.ones(1, HEIGHT, WIDTH), "auto")
    assert float(found.mask.min()) == 1 and "it covers everything" in found.said[0]


def test_auto_judges_each_picture() -> None:
    both = find(picture(2), torch.cat((box(), 1 - box())), "auto")
    assert all(is_box(found) for found in both)
    said = notes_on(both)
    assert said[0].startswith("Picture 1: the mask shows the subject")
    assert said[1].startswith("Picture 2: the mask shows the background")


@pytest.mark.parametrize("size", [(64, 64), (HEIGHT, WIDTH), (7, 9)])
@pytest.mark.parametrize(
    "reading", [{"invert": True}, {"shows": "background"}, {"shows": "auto"}], ids=str
)
def test_zeros_of_load_image_mean_no_alpha(size: tuple[int, int], reading: Any) -> None:
    (found,) = find(on_white(), torch.zeros(1, *size), **reading)
    assert is_box(found)
    assert found.said == ("The plain background was cut away: the mask is empty.",)


def test_zeros_that_are_no_mask_at_64_alone() -> None:
    """A mask that shows the subject is LoadImage's "none" at 64 x 64 and empty at other sizes."""
    assert is_box(find(on_white(), torch.zeros(1, 64, 64))[0])
    for size in ((64, 60), (60, 64), (HEIGHT, WIDTH)):
        with pytest.raises(SubjectError, match="mask of picture 1 is empty.*invert_mask or mask_s"):
            find(on_white(), torch.zeros(1, *size))
    with pytest.raises(SubjectError, match="is empty"):
        find(on_white(), torch.ones(1, HEIGHT, WIDTH), invert=True)


def test_one_picture_without_alpha_in_a_batch() -> None:
    image = torch.cat((picture(), on_white()))
    masks = torch.cat((1 - box(), torch.zeros(1, HEIGHT, WIDTH)))
    first, second = find(image, masks, invert=True)
    assert is_box(first) and first.said == ()
    assert is_box(second) and "background was cut away" in second.said[0]


def test_faint_masks_say_how_faint() -> None:
    """At most 0.5 is no subject; an empty one is called empty."""
    faint = box() * 0.43
    for mask, given in ((faint, {}), (1 - faint, {"invert": True}), (faint, {"shows": "auto"})):
        with pytest.raises(SubjectError, match=r"picture 1 is faint: .* reaches 0\.43, expected"):
            find(picture(), mask, **given)
    with pytest.raises(SubjectError, match=r"picture 2 is faint: its subject reaches 0\.5,"):
        find(picture(2), torch.cat((box(), box() * 0.5)))
    assert torch.equal(find(picture(), box() * 0.51)[0].mask, box()[0] * 0.51)


def test_alpha_is_the_mask_where_it_hides_something() -> None:
    rgba = torch.cat((picture(), box()[..., None]), dim=-1)
    assert is_box(find(rgba)[0])
    opaque = torch.cat((on_white(), torch.ones(1, HEIGHT, WIDTH, 1)), dim=-1)
    assert is_box(find(opaque)[0]) and "cut away: there is no mask" in find(opaque)[0].said[0]
    first, second = find(torch.cat((rgba, opaque)))
    assert is_box(first) and is_box(second) and second.said and not first.said
    other = torch.zeros(1, HEIGHT, WIDTH)
    other[:, 5:8, 5:8] = 1
    assert torch.equal(find(rgba, other)[0].mask, other[0])
    with pytest.raises(SubjectError, match="image: the alpha of picture 1 is empty"):
        find(torch.cat((picture(), torch.zeros(1, HEIGHT, WIDTH, 1)), dim=-1))


def test_a_mask_that_covers_the_border_is_pointed_out() -> None:
    """From nine tenths on."""
    for outside, hinted in ((22, False), (18, True)):  # of 200 pixels
        mask = torch.ones(1, HEIGHT, WIDTH)
        mask[:, 5 : 5 + outside, 0] = 0
        assert any(BORDER_HINT in s for s in find(picture(), mask)[0].said) == hinted
    (said,) = find(picture(), 1 - box())[0].said
    assert "set mask_shows to auto, or switch invert_mask" in said


def test_a_blank_picture_is_pointed_out() -> None:
    said = find(torch.full((1, HEIGHT, WIDTH, 3), 1.0))[0].said
    assert len(said) == 2 and "whole picture" in said[0]
    assert "one colour all over, #FFFFFF" in said[1] and "16 bits" in said[1]
    white = torch.full((1, HEIGHT, WIDTH, 3), 1.0)
    white[0, 0, :20] = 0  # values below 256 of 16 bits come out so: 20 of 2400 pixels
    assert "#FFFFFF" in find(white)[0].said[1]
    white[0, 1, :20] = 0
    assert len(find(white)[0].said) == 1


def test_under_a_mask_the_subject_is_looked_at() -> None:
    red = picture()
    red[0, 10:26, 20:36] = torch.tensor([1.0, 0.5, 0.0])
    (said,) = find(red, box())[0].said
    assert "one colour all over, #FF8000" in said
    red[0, 10:26, 20:36] += torch.linspace(0, 0.05, 16)[:, None, None]
    assert find(red, box())[0].said == ()


def test_sentences_of_a_batch_name_their_pictures() -> None:
    one = Found(torch.ones(1, 1), ("The same.",))
    other = Found(torch.ones(1, 1), ("Another.", "The same."))
    assert notes_on([one]) == ("The same.",)
    assert notes_on([one, Found(torch.ones(1, 1)), other]) == (
        "Pictures 1, 3: the same.",
        "Picture 3: another.",
    )
    assert notes_on([Found(torch.ones(1, 1))] * 2) == ()


def test_an_unknown_reading() -> None:
    with pytest.raises(SubjectError, match="^mask_shows: got 'both', expected one of .*'auto'"):
        MaskReading("both")
