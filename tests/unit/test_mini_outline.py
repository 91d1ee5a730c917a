"""Outlines: the best pose of a silhouette is found, whatever it is; shapes and losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("open_clip")

from devkit.graphs import INPUTS
from lab.measuring.finder import changed
from lab.measuring.networks import LARGEST_OUTLINE, OUTLINE_FILE, read_segmenter
from lab.measuring.outline import (
    SIDES,
    SIZE,
    Segmenter,
    best_overlap,
    loss_of_batch,
    shrunk,
    silhouettes,
)
from lab.networks.vae import to_signed
from lab.world.emoji import Emoji
from lab.world.render import render_scene


def places(side: int, turn: float, flip: float, size: float, x: float, y: float) -> Tensor:
    """Of each pixel (side,side) its place (2,side,side) in an unposed picture, in [-1,1]."""
    at = (torch.arange(side) + 0.5) * 2 / side - 1
    dy, dx = torch.meshgrid(at - y, at - x, indexing="ij")
    angle = torch.tensor(turn).deg2rad()
    across = flip * (angle.cos() * dx - angle.sin() * dy) / size
    return torch.stack((across, (angle.sin() * dx + angle.cos() * dy) / size))


def key(side: int, *pose: float) -> Tensor:
    """A shape without symmetry, (side,side) bool: an F."""
    x, y = places(side, *(pose or (0.0, 1.0, 1.0, 0.0, 0.0)))
    stem = ((x + 0.3).abs() < 0.12) & (y.abs() < 0.6)
    top = (x > -0.3) & (x < 0.5) & ((y + 0.48).abs() < 0.12)
    middle = (x > -0.3) & (x < 0.25) & ((y + 0.05).abs() < 0.12)
    return stem | top | middle


@pytest.mark.parametrize(
    "pose",
    [
        (0.0, 1.0, 1.0, 0.0, 0.0),
        (37.0, 1.0, 0.7, 0.2, -0.3),
        (-44.0, -1.0, 1.2, -0.1, 0.2),
    ],
)
def test_the_same_shape_in_any_pose(pose: tuple[float, ...]) -> None:
    found = best_overlap(key(160, *pose), key(320))
    assert found > 0.92


def test_what_lies_outside_of_the_picture_does_not_count() -> None:
    cut = key(160, 20.0, 1.0, 1.0, 0.75, 0.0)
    assert 0.5 < float(cut.sum() / key(160).sum()) < 0.97
    assert best_overlap(cut, key(320)) > 0.9


def test_other_shapes_overlap_less() -> None:
    x, y = places(160, 0.0, 1.0, 1.0, 0.0, 0.0)
    disc = x.square() + y.square() < 0.2
    assert best_overlap(disc, key(320)) < 0.6
    turned = key(160, 180.0, 1.0, 1.0, 0.0, 0.0)  # no pose of the world
    assert best_overlap(turned, key(320)) < 0.65
    nothing = torch.zeros_like(disc)
    assert best_overlap(nothing, disc) == best_overlap(disc, nothing) == 0.0


def test_segmenter_answers_at_its_own_size_and_learns() -> None:
    torch.manual_seed(0)
    network = Segmenter()
    assert silhouettes(network.eval(), torch.zeros(2, 3, 320, 320)).shape == (2, SIZE, SIZE)
    assert sum(p.numel() for p in network.parameters()) * 2 < 2 * 2**20  # in half precision
    network.train()
    masks = torch.stack((key(SIZE), key(SIZE, 30.0, -1.0, 0.8, 0.1, 0.1))).float()
    pixels = (2 * masks - 1)[:, None].expand(-1, 3, -1, -1)
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-3)
    losses: list[float] = []
    for step in range(16):
        generator = torch.Generator().manual_seed(step)
        loss = loss_of_batch(network(changed(pixels, generator, SIDES)), masks)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_kept_segmenter_finds_held_out_subjects() -> None:
    """docs/mini.md has the figure over all of them."""
    assert OUTLINE_FILE.stat().st_size <= LARGEST_OUTLINE
    network = read_segmenter()
    pool = [
        [Emoji(name, name, name, INPUTS / f"anystory_{name}.png")]
        for name in ("t_rex", "mushroom", "parrot")
    ]
    for seed in range(6):
        scene = render_scene(pool, seed, subjects=1)
        (found,) = silhouettes(network, to_signed(torch.from_numpy(scene.picture.copy())[None]))
        true = torch.from_numpy(shrunk(scene.instances[0].mask) >= 0.5)
        assert (found & true).sum() > 0.9 * (found | true).sum(), f"scene {seed}"


def test_a_mirror_image_has_the_mirrored_silhouette() -> None:
    torch.manual_seed(0)
    network = Segmenter().eval()
    pictures = torch.rand(2, 3, 320, 320) * 2 - 1
    found = silhouettes(network, pictures)
    assert found.any() and not found.all()
    mirrored = silhouettes(network, pictures.flip(-1)).flip(-1)
    assert (found == mirrored).float().mean() > 0.999  # sums of equal terms, in another order
