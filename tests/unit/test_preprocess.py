"""Pictures and masks of a subject: geometry, masks from everywhere, bad input."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.errors import SubjectError
from anystory_core.subject.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    _resize,
    cut_out,
    latent_mask,
    prepare_views,
    views_of,
    zero_clip,
)

CONFIG = AnyStoryConfig.mini()
CLIP, VAE = CONFIG.clip.image_size, CONFIG.reference.size


def picture(height: int = 40, width: int = 60, channels: int = 3, count: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, height, width, channels, generator=generator)


def box(
    height: int = 40, width: int = 60, *, top: int = 10, left: int = 20, side: int = 16
) -> Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, top : top + side, left : left + side] = 1
    return mask


def test_outside_is_zero_after_normalisation() -> None:
    # A margin of 3 source pixels: resampling reaches over 2.
    views = prepare_views(picture(200, 300), box(200, 300, side=150), CONFIG)
    assert views.clip.shape == (1, 3, CLIP, CLIP) and views.vae.shape == (1, 3, VAE, VAE)
    for x in (views.clip, views.vae):
        assert torch.count_nonzero(x[..., 0, :]) == 0 and torch.count_nonzero(x[..., :, -1]) == 0
    outside = views.mask == 0
    assert torch.count_nonzero(views.vae * outside) == 0
    assert torch.all(views.cutout[outside[:, 0]] == 128)
    assert torch.equal(zero_clip(CONFIG), torch.zeros(1, 3, CLIP, CLIP))


def test_inside_is_the_picture_normalised() -> None:
    plain = torch.full((1, 40, 60, 3), 0.75)
    views = prepare_views(plain, box(), CONFIG)
    centre = views.clip[0, :, CLIP // 2, CLIP // 2]
    wanted = (0.75 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert torch.allclose(centre, wanted, atol=1e-5)
    assert torch.allclose(views.vae[0, :, VAE // 2, VAE // 2], torch.full((3,), 0.5), atol=1e-5)
    assert torch.all(views.cutout[0, VAE // 2, VAE // 2] == 191)  # 0.75 of 255, to the nearest


def test_a_ramp_stays_one() -> None:
    """Centres of pixels lie on centres, whatever the size."""
    ramp = (torch.arange(64) + 0.5) / 64
    for size in (16, 24, 200):
        made = _resize(ramp.expand(1, 3, 64, 64).clone(), size)[0, 0, size // 2]
        wanted = (torch.arange(size) + 0.5) / size
        inner = slice(size // 8, -(size // 8))  # the edges have no neighbours
        assert torch.allclose(made[inner], wanted[inner], atol=1e-4), size


def test_a_mask_of_the_outside() -> None:
    """Turned over on request, or where it owns the border."""
    wanted = prepare_views(picture(), box(), CONFIG)
    for changes in ({"invert_mask": True}, {"mask_shows": "background"}, {"mask_shows": "auto"}):
        found = prepare_views(picture(), 1 - box(), CONFIG, **changes)
        assert torch.equal(found.vae, wanted.vae), changes
    assert any("border" in note for note in found.notes)
    assert not torch.equal(prepare_views(picture(), 1 - box(), CONFIG).vae, wanted.vae)


@pytest.mark.parametrize(("top", "left", "side"), [(10, 20, 16), (0, 0, 40), (24, 44, 16)])
def test_the_box_is_enlarged_and_centred(top: int, left: int, side: int) -> None:
    """A square mask of side s fills s / round(1.04 s) of the crop, also over the picture's edge."""
    views = prepare_views(picture(), box(top=top, left=left, side=side), CONFIG)
    filled = (views.mask[0, 0] > 0.5).float()
    share = side / round(1.04 * side)
    for profile in (filled.amax(0), filled.amax(1)):
        assert abs(float(profile.mean()) - share) < 0.02
        nonzero = torch.nonzero(profile)[:, 0]
        before, after = int(nonzero[0]), VAE - 1 - int(nonzero[-1])
        assert abs(before - after) <= VAE / side + 1  # an odd margin is one source pixel off centre


def test_channels() -> None:
    grey = prepare_views(picture(channels=1), box(), CONFIG)
    assert torch.equal(grey.vae[:, 0], grey.vae[:, 2])
    rgba = torch.cat((picture(), box().movedim(0, -1)[None]), dim=-1)
    from_alpha = prepare_views(rgba, None, CONFIG)
    given = prepare_views(picture(), box(), CONFIG)
    assert torch.equal(from_alpha.vae, given.vae) and torch.equal(from_alpha.clip, given.clip)


def test_several_views_are_cut_each_by_its_own_mask() -> None:
    masks = torch.cat((box(), box(top=2, left=3, side=9)))
    both = prepare_views(picture(count=2), masks, CONFIG)
    for i in range(2):
        one = prepare_views(picture(count=2)[i : i + 1], masks[i : i + 1], CONFIG)
        assert torch.equal(both.vae[i : i + 1], one.vae)
    shared = prepare_views(picture(count=2), box(), CONFIG)
    assert shared.vae.shape[0] == 2


BAD = {
    "two channels": (picture(channels=2), None, "1, 3 or 4 channels"),
    "no batch": (picture()[0], None, "expected (pictures, height"),
    "NaN": (picture() * float("nan"), None, "NaN"),
    "mask of another shape": (picture(), torch.ones(1, 50, 50), "same shape"),
    "two masks for one picture": (picture(), torch.ones(2, 40, 60), "one mask"),
    "mask with NaN": (picture(), torch.full((1, 40, 60), float("nan")), "NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    image, mask, words = BAD[name]
    with pytest.raises(SubjectError, match=re.escape(words)):
        prepare_views(image, mask, CONFIG)


def test_a_mask_at_another_scale_is_fitted() -> None:
    small = torch.zeros(1, 80, 120)
    small[:, 20:52, 40:72] = 1
    views = prepare_views(picture(160, 240), small, CONFIG)
    wanted = prepare_views(picture(160, 240), box(160, 240, top=40, left=80, side=64), CONFIG).mask
    # The outline is soft by one pixel of the larger mask: 4 x 64 of 66 x 66 pixels, half each.
    assert float((views.mask - wanted).abs().mean()) < 0.03


@pytest.mark.parametrize("size", [(1, 1), (5000, 20), (20, 5000), (3, 2)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    views = prepare_views(picture(*size), torch.ones(1, *size), CONFIG)
    assert bool(torch.isfinite(views.clip).all()) and float(views.mask.max()) > 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    channels=st.sampled_from((1, 3, 4)),
    seed=st.integers(0, 99),
)
def test_any_picture_gives_bounded_inputs(
    height: int, width: int, channels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, height, width, channels, generator=generator)
    mask = (torch.rand(1, height, width, generator=generator) > 0.7).float()
    mask[:, height // 2, width // 2] = 1
    views = prepare_views(image, mask, CONFIG)
    assert float(views.vae.abs().max()) <= 1 and float(views.mask.min()) >= 0
    assert float(views.mask.max()) <= 1
    assert torch.equal(views.clip, prepare_views(image, mask, CONFIG).clip)  # pure


def test_the_mask_channel_is_an_area_average() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3, :] = 1
    assert torch.equal(latent_mask(mask, (2, 2))[0, 0], torch.tensor([[0.75, 0.75], [0, 0]]))


def test_one_picture_of_training_data_is_cut_by_its_mask() -> None:
    wanted = prepare_views(picture(), box(), CONFIG)
    views = views_of([cut_out(picture()[0], box()[0])], CONFIG)
    assert torch.equal(views.vae, wanted.vae) and torch.equal(views.clip, wanted.clip)
