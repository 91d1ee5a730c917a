"""Odd input that means something is taken as it is meant."""

from __future__ import annotations

import pytest
import torch
from scene import SIZE, Scene

ACCEPTED = {
    "1 channel": torch.rand(1, 40, 30, 1),
    "4 channels": torch.rand(1, 40, 30, 4),
    "1x1": torch.rand(1, 1, 1, 3),
    "5000x20": torch.rand(1, 20, 5000, 3),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_pictures_are_accepted(scene: Scene, name: str) -> None:
    """They act as subjects, each as itself and as what it means in three channels."""
    image = ACCEPTED[name]
    subject = scene.encode_picture(image, label="odd")
    out = scene.sample(scene.apply(routing=scene.route(subject, scene.subjects[1])), steps=1)
    assert out.shape == (1, 4, SIZE // 8, SIZE // 8)
    alone = scene.sample(scene.apply(routing=scene.route(scene.subjects[1])), steps=1)
    assert (out - alone).norm() > 0.02 * alone.norm()
    meant = {"image": image[..., :3].expand(*image.shape[:3], 3)}
    if image.shape[-1] == 4:
        meant["mask"] = image[..., 3]
    wanted = scene.encode_picture(**meant)
    assert torch.equal(subject.tokens, wanted.tokens)


@pytest.mark.parametrize(
    ("label", "kept"),
    [
        ("", "subject"),
        ("  \n\t ", "subject"),
        ("a\x00b\x1b[31m", "a b [31m"),
        ("Füchsin 狐 🦊", "Füchsin 狐 🦊"),
        ("../../etc/passwd", "../../etc/passwd"),
        ("x" * 500, "x" * 60),
    ],
)
def test_labels(scene: Scene, label: str, kept: str) -> None:
    subject = scene.encode(0, label=label)
    assert subject.label == kept
    model, maps = scene.apply_with_maps(routing=scene.route(subject, scene.subjects[1]))
    out = scene.sample(model, steps=1)
    assert scene.preview(maps, out).args[0].ndim == 4
