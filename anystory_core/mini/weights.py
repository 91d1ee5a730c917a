"""The mini model's weight files, beside this module. Parts that are not trained yet get
reproducible random weights, so that every path runs; whoever loads them says so."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..bases.sdxl.prediction import MARKS
from ..tensor_files import open_tensors, read_tensors
from .config import TEXT

FOLDER = Path(__file__).parent / "weights"
PARTS = ("unet", "vae", "clip_text", "clip_vision", "anystory")


def path(part: str) -> Path:
    """Where the file of a part lies, or would lie."""
    return FOLDER / f"{part}.safetensors"


_TABLE = "text_model.embeddings.token_embedding.weight"
_TOKENS = "token_ids"


def row_of_token(ids: Sequence[int] | Tensor) -> Tensor:
    """(49408,) int64: the row of each token, 0 for tokens without a row of their own."""
    rows = torch.zeros(TEXT["vocab_size"], dtype=torch.int64)
    rows[torch.as_tensor(ids, dtype=torch.int64)] = torch.arange(1, len(ids) + 1)
    return rows


def pack_text(state: dict[str, Tensor], ids: Sequence[int]) -> dict[str, Tensor]:
    """A text encoder that knows ``len(ids) + 1`` rows, with the tokens that they belong to."""
    return {**state, _TOKENS: torch.tensor(list(ids), dtype=torch.int32)}


def full_table(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of :func:`pack_text` with the host's whole table (49408, D) instead."""
    rows = row_of_token(state[_TOKENS])
    full = {name: tensor for name, tensor in state.items() if name != _TOKENS}
    full[_TABLE] = state[_TABLE][rows]
    return full


def marks(part: str) -> dict[str, Tensor]:
    """The tensors of a part's file that say what the U-Net predicts; none without a file."""
    if not path(part).exists():
        return {}
    with open_tensors(path(part)) as file:
        names = set(file.keys())
        return {name: file.get_tensor(name) for name in MARKS if name in names}


def load_state(part: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], bool]:
    """(state dict without :func:`marks`, trained?) of a part whose module has these tensors."""
    if path(part).exists():
        state = read_tensors(path(part))
        state = {name: tensor for name, tensor in state.items() if name not in MARKS}
        return (full_table(state) if _TOKENS in state else state), True
    return {name: random_tensor(name, shape) for name, shape in shapes.items()}, False


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Fan-in scaled normal weights, ones for norms, zeros for biases; same input, same values."""
    if len(shape) < 2:
        is_scale = name.endswith("weight") or name.endswith("scale")
        return torch.ones(shape) if is_scale else torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    fan_in = torch.Size(shape[1:]).numel()
    return torch.randn(shape, generator=generator) / fan_in**0.5
