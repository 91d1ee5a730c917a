"""Damaged files of the authors' kind: a clear error each, and nothing of them is run."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import flux_release
import pytest
import torch
from flux_scene import CONFIG
from safetensors.torch import load_file

from anystory_core.errors import AnyStoryError
from anystory_core.weights.convert.flux import convert_flux


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    return flux_release.write(tmp_path, CONFIG)


def convert(files: tuple[Path, Path]) -> Path:
    out = files[0].parent / "out.safetensors"
    return convert_flux(*files, out, head_dim=CONFIG.transformer.head_dim).path


def mutate(data: bytearray, generator: random.Random) -> bytearray:
    """A cut, or some bytes changed where the file says what it holds (not inside a tensor, whose
    damage the sums of the zip show as well)."""
    kind = generator.randrange(4)
    if kind == 0:
        return data[: generator.randrange(len(data))]
    names = [data.find(b"data.pkl"), data.rfind(b"PK\x01\x02"), data.rfind(b"PK\x05\x06"), 0]
    for _ in range(generator.choice((1, 1, 2, 8))):
        near = max(0, generator.choice(names)) + generator.randrange(3000)
        place = near % len(data) if kind < 3 else generator.randrange(len(data))
        value = generator.choice((0, 255, data[place] ^ (1 << generator.randrange(8))))
        data[place] = value
    return data


def test_a_thousand_damaged_files(files: tuple[Path, Path]) -> None:
    """A clear error each, or (where only a field changed that means nothing) the same result."""
    whole = files[0].read_bytes()
    expected = load_file(convert(files))
    generator = random.Random(0)
    refused = 0
    for _ in range(1000):
        files[0].write_bytes(mutate(bytearray(whole), generator))
        (files[0].parent / "out.safetensors").unlink(missing_ok=True)
        try:
            done = convert(files)
        except AnyStoryError as error:
            assert files[0].name in str(error) and len(str(error)) > 40
            refused += 1
            continue
        found = load_file(done)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert refused > 900


def test_damaged_pickles_inside_a_sound_zip(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Sums that fit: the weights-only reader alone stands between."""
    generator = random.Random(1)
    with zipfile.ZipFile(files[0]) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (pickle,) = [name for name in parts if name.endswith("data.pkl")]
    refused = 0
    for _ in range(150):
        data = bytearray(parts[pickle])
        for _ in range(generator.choice((1, 2, 5))):
            data[generator.randrange(len(data))] = generator.randrange(256)
        with zipfile.ZipFile(files[0], "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, bytes(data) if name == pickle else content)
        try:
            convert(files)
        except AnyStoryError as error:
            assert files[0].name in str(error)
            refused += 1
    assert refused > 100
