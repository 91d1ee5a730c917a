"""The eye that is not ours: what it is shown of real subjects. The network needs its packages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

pytest.importorskip("open_clip")

from lab.measuring.eye import SIZE, Eye, known, render_crop
from lab.world.emoji import Emoji

ROOM = 1.25


@pytest.fixture
def bar(tmp_path: Path) -> Emoji:
    picture = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(picture).rectangle((16, 96, 240, 160), fill=(230, 30, 30, 255))
    picture.save(tmp_path / "bar.png")
    return Emoji("0", "bar", "bar", tmp_path / "bar.png")


def test_a_crop_has_the_subject_in_its_middle_and_room_around_it(bar: Emoji) -> None:
    ground = np.full((320, 320, 3), (0, 0, 255), np.uint8)
    for seed in range(6):
        crop = render_crop(bar, ground, random.Random(seed), ROOM)
        assert crop.shape == (SIZE, SIZE, 3)
        ys, xs = np.nonzero(crop[..., 0] > 128)
        assert abs((xs.min() + xs.max()) / 2 - SIZE / 2) <= 2.5
        assert abs((ys.min() + ys.max()) / 2 - SIZE / 2) <= 2.5
        assert xs.max() - xs.min() + 1 == pytest.approx(SIZE / ROOM, abs=5)
        assert crop[0, 0, 2] > 200


def test_subjects_are_known_by_the_mean_of_their_renders(bar: Emoji) -> None:
    seen: list[Tensor] = []

    def eye(crops: Tensor) -> Tensor:
        seen.append(crops)
        return functional.normalize(crops.mean(dim=(2, 3)), dim=-1)

    rows = known(cast(Eye, eye), [bar, bar], [np.zeros((320, 320, 3), np.uint8)], 5, ROOM)
    assert rows.shape == (2, 3) and torch.allclose(rows.norm(dim=-1), torch.ones(2))
    assert [crops.shape for crops in seen] == [(6, 3, SIZE, SIZE)] * 2
    assert seen[0].min() >= -1 and seen[0].max() <= 1
    assert not torch.equal(seen[0], seen[1])  # each subject has renders of its own


def test_imagenets_features_are_unit_vectors() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    crops = torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = Eye()(crops)
    assert features.shape == (2, 1280)
    assert torch.allclose(features.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert not torch.allclose(features[0], features[1], atol=1e-2)
