"""The files of a network in a folder: one, one of a variant, or pieces that an index names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anystory_core.errors import CheckpointError
from anystory_core.weights.folders import NetworkFiles, network_files


def names(found: NetworkFiles | None) -> tuple[list[str], str] | None:
    return None if found is None else ([file.name for file in found.files], found.variant)


def index(folder: Path, name: str, parts: list[str]) -> None:
    """An index that says of each part that it holds something, and of the first that it holds two
    tensors; the parts that it names lie beside it."""
    table = {f"tensor.{i}": part for i, part in enumerate([*parts, *parts[:1]])}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    for part in parts:
        (folder / part).touch()


def test_what_is_taken_first(tmp_path: Path) -> None:
    """No variant before fp16 before bf16, a whole file before pieces."""
    assert network_files(tmp_path, "model") is None
    (tmp_path / "other.safetensors").touch()
    assert network_files(tmp_path, "model") is None
    index(tmp_path, "model.safetensors.index.bf16.json", ["model.bf16-1.safetensors"])
    assert names(network_files(tmp_path, "model")) == (["model.bf16-1.safetensors"], "bf16")
    (tmp_path / "model.fp16.safetensors").touch()
    assert names(network_files(tmp_path, "model")) == (["model.fp16.safetensors"], "fp16")
    index(tmp_path, "model.safetensors.index.json", ["model-2.safetensors", "model-1.safetensors"])
    pieces = ["model-1.safetensors", "model-2.safetensors"]
    assert names(network_files(tmp_path, "model")) == (pieces, "")
    (tmp_path / "model.safetensors").touch()
    assert names(network_files(tmp_path, "model")) == (["model.safetensors"], "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"model\.safetensors\.index\.json: is not JSON .*; get it again"),
        ("[]", "names no files, .* get the whole folder again"),
        ("{}", "names no files"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"names \['gone.safetensors'\]"),
    ],
)
def test_an_index_that_names_nothing(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        network_files(tmp_path, "model")


def test_an_index_reaches_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model.safetensors").touch()
    table = {"weight_map": {"a": "../model.safetensors"}}
    (tmp_path / "unet" / "model.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="are not in it"):
        network_files(tmp_path / "unet", "model")
