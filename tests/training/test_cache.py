"""The cache of encodings: named by what was encoded, so nothing stale is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anystory_core.bases.sdxl.config import ReferenceConfig
from anystory_core.training.batches import Batch
from anystory_core.training.cache import Encodings
from anystory_core.training.checkpoints import CheckpointFolderError
from anystory_core.training.config import TrainingConfig
from anystory_core.training.settings import BaseSettings, DataSettings, RunSettings, SubjectSettings
from anystory_core.weights.fingerprint import weights_fingerprint


class CountingBase:
    """Encodes a picture as its mean, and counts the pictures."""

    def __init__(self, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        self.fingerprint, self.unet, self.encoded = "base", SimpleNamespace(dtype=dtype), 0
        self.config = SimpleNamespace(reference=ReferenceConfig(latent_scale=scale))

    def encode_picture(self, pixels: Tensor) -> Tensor:
        self.encoded += len(pixels)
        return pixels.mean(dim=(2, 3), keepdim=True)


def encodings(base: Any, folder: Path) -> Encodings:
    config = TrainingConfig(
        base=BaseSettings(path="unused"),
        data=DataSettings(paths=("unused",), cache=str(folder), mirror=True),
        run=RunSettings(folder="unused", steps=1),
        subject=SubjectSettings(),
    )
    return Encodings(base, config)


def batch(*pictures: Tensor) -> Batch:
    """Samples that all have one key."""
    n, none = len(pictures), torch.zeros(len(pictures), 1)
    return Batch(
        numbers=tuple(range(n)),
        keys=("data/0001",) * n,
        captions=("",) * n,
        target=torch.stack(pictures),
        time_ids=none,
        masks=none,
        clip=none,
        vae=none,
        reference_mask=none,
        present=none,
        drop_clip=none,
        bad=(),
    )


def test_one_key_and_two_pictures(tmp_path: Path) -> None:
    """Two folders may hold the same keys, and a picture may be replaced or mirrored."""
    torch.manual_seed(0)
    base, cpu = CountingBase(), torch.device("cpu")
    one, two = torch.rand(2, 3, 8, 8)
    first = encodings(base, tmp_path).latents(batch(one, two), cpu)
    assert torch.equal(first, base.encode_picture(torch.stack((one, two)))) and base.encoded == 4
    again = encodings(base, tmp_path).latents(batch(two, one), cpu)
    assert torch.equal(again, first.flip(0)) and base.encoded == 4
    encodings(base, tmp_path).latents(batch(one.flip(-1)), cpu)
    assert base.encoded == 5


def test_another_precision_or_scale_has_its_own_entries(tmp_path: Path) -> None:
    picture, cpu = torch.rand(3, 8, 8), torch.device("cpu")
    for dtype, scale in ((torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float32, 0.13)):
        base = CountingBase(dtype, scale)
        encodings(base, tmp_path).latents(batch(picture), cpu)
        assert base.encoded == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointFolderError, match=r"data\.cache: .*free space or name another"):
        encodings(CountingBase(), tmp_path / "file").latents(
            batch(torch.rand(3, 8, 8)), torch.device("cpu")
        )


def test_every_network_counts_in_the_fingerprint() -> None:
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 1)) for _ in range(3)]
    names = {weights_fingerprint(*networks)}
    for network in networks:
        with torch.no_grad():
            network[1].bias.add_(1)
        names.add(weights_fingerprint(*networks))
    assert len(names) == 4
