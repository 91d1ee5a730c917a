"""Colours that can be told apart."""

from __future__ import annotations

import importlib

import pytest
import torch

from anystory_core.pictures.palette import palette

# Machado, Oliveira, Fernandes 2009, severity 1: linear RGB as seen with each kind of sight.
SIGHTS = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize(("subjects", "least"), [(3, 40.0), (6, 24.0), (8, 18.0)])
def test_colours_can_be_told_apart(sight: str, subjects: int, least: float) -> None:
    """Distance in Lab; about 2.3 is just noticeable, 18 is plain to see."""
    color = importlib.import_module("kornia.color")
    rgb = torch.tensor(palette(subjects)).float().T.reshape(1, 3, -1, 1) / 255
    linear = color.rgb_to_linear_rgb(rgb)[0, :, :, 0]
    seen = (torch.tensor(SIGHTS[sight]).float() @ linear).clamp(0, 1)
    lab = color.rgb_to_lab(color.linear_rgb_to_rgb(seen.reshape(1, 3, -1, 1)))[0, :, :, 0].T
    distance = torch.cdist(lab, lab) + 1e6 * torch.eye(subjects)
    assert float(distance.min()) >= least
    # Every colour also stands out from an empty tile, whose lightness is 19.
    assert float(lab[:, 0].min()) > 35


def test_a_ninth_subject_has_a_colour() -> None:
    assert palette(9)[8] == palette(1)[0]
