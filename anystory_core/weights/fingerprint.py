"""Short names of files, weights and tensors by what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

_DIGITS = 16  # hexadecimal, of the short ones
_SAMPLE = 65536  # bytes
_SAMPLES = 16  # of a file
_BLOCK = 4 * 2**20  # bytes read at once
_VALUES = 64  # of a tensor


def file_fingerprint(path: Path) -> str:
    """Of a file's size, its beginning and samples over its length: cheap at any size, and different
    for different weights in practice."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for part in range(_SAMPLES):
            file.seek(max(0, (size - _SAMPLE) * part // (_SAMPLES - 1)))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:_DIGITS]


def file_sha256(path: Path, read: Callable[[int], None] | None = None) -> str:
    """SHA-256 of the whole file. ``read`` is told how many bytes were read, every few MiB; what it
    raises ends the reading, so a user can cancel it."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if read is not None:
                read(len(block))
    return digest.hexdigest()


def weights_fingerprint(*modules: nn.Module) -> str:
    """Of networks: all names and shapes, and the first values of every tensor."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            values = tensor.detach().flatten()[:_VALUES].to("cpu", torch.float32)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def latent_fingerprint(latent: Tensor) -> str:
    """Of all values in float16, wherever they lie: a host that keeps intermediate results in half
    precision returns another latent than it samples."""
    data = latent.detach().to("cpu", torch.float16).contiguous()
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()
