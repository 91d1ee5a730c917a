"""Files of weights as the recipe writes them: half precision on disk, float32 in training."""

from __future__ import annotations

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
    if not (file.exists() and _same(read_tensors(file), half)):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, half, {})
    return file.stat().st_size


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def read_wide(file: Path) -> dict[str, Tensor]:
    """The same, widened to float32. FileNotFoundError when it is missing."""
    return {n: t.float() if t.is_floating_point() else t for n, t in read_tensors(file).items()}
