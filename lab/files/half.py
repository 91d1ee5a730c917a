"""Files of weights as the recipe writes them: half precision on disk, float32 in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from anystory_core.tensor_files import read_tensors, save_tensors


def write_half(state: dict[str, Tensor], file: Path) -> int:
    """Save in half precision; the size in bytes. What is not floating point stays as it is, and so
    does a file that holds these very tensors: each new version of it costs history its size."""
    half = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in state.items()
    }
    if not holds(file, half):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, half, {})
    return file.stat().st_size


def holds(file: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file is there and holds these very tensors. Its bytes do not tell: safetensors
    writes what it says of itself in an order that changes from one writing to the next."""
    if not file.exists():
        return False
    there = read_tensors(file)
    return there.keys() == tensors.keys() and all(
        tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])
        for name, tensor in there.items()
    )


def read_wide(file: Path) -> dict[str, Tensor]:
    """The same, widened to float32. FileNotFoundError when it is missing."""
    return {n: t.float() if t.is_floating_point() else t for n, t in read_tensors(file).items()}
