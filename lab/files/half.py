"""Files of weights as the recipe writes them: half precision on disk, float32 in training."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from anystory_core.tensor_files import read_tensors, save_tensors


def write_half(state: dict[str, Tensor], file: Path) -> int:
    """Save in half precision; the size in bytes. What is not floating point stays as it is."""
    half = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in state.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(file, half, {})
    return file.stat().st_size


def read_wide(file: Path) -> dict[str, Tensor]:
    """The same, widened to float32. FileNotFoundError when it is missing."""
    return {n: t.float() if t.is_floating_point() else t for n, t in read_tensors(file).items()}
