"""The identity network's data and shapes: cut-outs over scenes, softer halves, galleries."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

pytest.importorskip("open_clip")

from lab.measuring.identity import Identity, gallery, place_cut, render_cut, soften, train_identity
from lab.world.emoji import Emoji


@pytest.fixture
def disc(tmp_path: Path) -> Emoji:
    picture = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(picture).ellipse((20, 20, 236, 236), fill=(230, 30, 30, 255))
    picture.save(tmp_path / "disc.png")
    return Emoji("0", "disc", "disc", tmp_path / "disc.png")


def test_cut_is_centred_and_placed_over_the_ground(disc: Emoji) -> None:
    ground = np.full((128, 128, 3), (0, 0, 255), np.uint8)
    for seed in range(8):
        cut = render_cut(disc, random.Random(seed))
        ys, xs = np.nonzero(cut[..., 3] > 127)
        # the box's middle is the canvas's middle, to a pixel of rounding on either side
        assert abs((ys.min() + ys.max()) / 2 - 39.5) <= 1.5
        assert abs((xs.min() + xs.max()) / 2 - 39.5) <= 1.5
        assert 52 <= xs.max() - xs.min() + 1 <= 65
        placed = place_cut(cut, ground, random.Random(seed))
        assert placed.shape == (64, 64, 3)
        red, blue = placed[32, 32], placed[0, 0]
        assert red[0] > red[2] and blue[2] > blue[0]


def test_half_of_a_batch_is_softer() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, 64, 64, generator=generator)
    out = soften(pixels, generator)
    assert torch.equal(out[3:], pixels[3:])
    rough = pixels.diff(dim=-1).square().mean(dim=(1, 2, 3))
    assert (out[:3].diff(dim=-1).square().mean(dim=(1, 2, 3)) < 0.9 * rough[:3]).all()


def test_gallery_is_a_unit_vector_per_subject(disc: Emoji) -> None:
    torch.manual_seed(0)
    network = Identity().eval()
    ground = np.zeros((128, 128, 3), np.uint8)
    rows = gallery(network, [disc, disc], [ground], renders=2, seed=3)
    assert rows.shape == (2, 128)
    assert torch.allclose(rows.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert torch.equal(rows, gallery(network, [disc, disc], [ground], renders=2, seed=3))


def test_without_rendered_scenes_it_says_what_to_run(tmp_path: Path, disc: Emoji) -> None:
    folder = tmp_path / "work"
    with pytest.raises(FileNotFoundError, match=r"identity: no shard in .*; run the phase world"):
        train_identity([disc], folder)
    assert not folder.exists()
