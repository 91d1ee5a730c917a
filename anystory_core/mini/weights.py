"""The mini model's weight files, beside this module. Parts that are not trained yet get reproducible
random weights, so that every path runs; whoever loads them says so."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

FOLDER = Path(__file__).parent / "weights"
PARTS = ("unet", "vae", "clip_text", "clip_vision", "anystory")


def path(part: str) -> Path:
    """Where the file of a part lies, or would lie."""
    return FOLDER / f"{part}.safetensors"


def load_state(part: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], bool]:
    """(state dict, trained?) of a part whose module has these tensors."""
    if path(part).exists():
        return load_file(path(part)), True
    return {name: random_tensor(name, shape) for name, shape in shapes.items()}, False


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Fan-in scaled normal weights, ones for norms, zeros for biases; a function of its arguments."""
    if len(shape) < 2:
        is_scale = name.endswith("weight") or name.endswith("scale")
        return torch.ones(shape) if is_scale else torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    fan_in = torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator) / fan_in**0.5
