"""What augmentation does to a reference, and what it leaves alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from anystory_core.data import shards
from anystory_core.training.augment import augment
from anystory_core.training.config import TrainingConfig
from anystory_core.training.dataset import SampleDataset
from anystory_core.training.order import Order
from anystory_core.training.samples import Samples, draw_pools
from anystory_core.training.settings import (
    AugmentSettings,
    BaseSettings,
    DataSettings,
    RouterSettings,
    RunSettings,
)

NOTHING: dict[str, Any] = {"rotate": 0.0, "crop": 0.0, "pad": 0.0, "flip": 0.0}
COLOUR = torch.tensor([0.8, 0.5, 0.3])[None, :, None, None]


@pytest.mark.parametrize("change", NOTHING)
def test_the_mask_follows_the_picture(change: str) -> None:
    """A subject of one colour that no symmetry maps to itself: after any change its mask is where
    its colour is, and nothing else is."""
    mask = torch.zeros(1, 1, 48, 48)
    mask[..., 8:40, 10:20] = 1
    mask[..., 30:40, 20:36] = 1
    picture = torch.where(mask > 0, COLOUR, torch.tensor(0.1))
    settings = AugmentSettings(**{**NOTHING, change: 1.0})
    moved = 0
    for seed in range(10):
        got, its_mask = augment(picture, mask, settings, random.Random(seed))
        assert got.shape[-2:] == its_mask.shape[-2:] and got.shape[-1] == got.shape[-2]
        inside, outside = its_mask > 0.5, its_mask < 0.005
        assert bool(inside.any())
        where = inside.expand_as(got)
        assert torch.allclose(got[where], COLOUR.expand_as(got)[where], atol=0.02)
        assert not got[outside.expand_as(got)].any()
        moved += its_mask.shape != mask.shape or not torch.equal(its_mask, mask)
    assert moved >= 8  # a random crop or border may now and then be empty


def dataset(folder: Path, augmentation: AugmentSettings) -> SampleDataset:
    config = TrainingConfig(
        base=BaseSettings(path="unused"),
        data=DataSettings(paths=(str(folder),), resolution=tiny.SIZE, max_subjects=2),
        run=RunSettings(folder="unused", steps=1),
        router=RouterSettings(subject_file="unused", drop_text=0.0),
        augment=augmentation,
    )
    samples = Samples.of(config.data.paths)
    pools = draw_pools(samples, config)
    order = Order(pools.positions, pools.shares, config.run.seed)
    return SampleDataset(samples, order, config, tiny.config())


def test_a_crop_of_the_reference_leaves_the_routing_target_whole(tmp_path: Path) -> None:
    shards.write_folder(tiny.scenes(6), tmp_path)
    plain = AugmentSettings(**NOTHING)
    whole, cropped = (
        dataset(tmp_path, a) for a in (plain, replace(plain, crop=1.0, least_kept=0.4))
    )
    changed = 0
    for number in range(6):
        a, b = whole[number], cropped[number]
        assert torch.equal(a.target, b.target)
        # The order of the subjects is drawn from the same numbers, so the masks are the same too.
        assert torch.equal(a.masks, b.masks) and torch.equal(a.present, b.present)
        changed += not torch.equal(a.vae, b.vae)
    assert changed >= 5
