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
    subject = scene.encode_picture(ACCEPTED[name], label="odd")
    assert all(torch.isfinite(x).all() for x in (subject.tokens, *subject.features))
    out = scene.sample(scene.apply(routing=scene.route(subject, scene.subjects[1])), steps=1)
    assert torch.isfinite(out).all() and out.shape == (1, 4, SIZE // 8, SIZE // 8)


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
