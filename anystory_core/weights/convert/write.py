"""A ``.safetensors`` file written tensor by tensor.

The library's own writer wants every tensor at once; here the header is written first, from the
names and shapes alone, and each tensor follows when it is made.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...tensor_files import atomic_file

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SPARE = 64 * 2**20  # bytes of the disk that are never planned for


def write_streaming(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    origin: Callable[[str], str],
) -> int:
    """Write ``make(name)`` for each name of ``shapes``, in order; returns the file's size.
    ``origin(name)``: what messages call the file that the tensor comes from.

    Tensors are stored as ``dtype`` (float32, float16 or bfloat16). At no time is more than one of
    them held. The file appears whole under its name or not at all. CheckpointError: the disk is
    too small or cannot be written to, or a tensor does not fit into ``dtype``.
    """
    path = Path(path)
    header = _header(shapes, dtype, metadata)
    size = _size(header, shapes, dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(path, size)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            file.write(header)
            for name, shape in shapes.items():
                file.write(_bytes(name, make(name), shape, dtype, origin))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"{path.name}: the disk became full after {size / 1e9:.2f} GB were planned; make "
                f"room in {path.parent} and convert again"
            ) from error
        raise CheckpointError(
            f"{path.name}: cannot be written in {path.parent} ({error.strerror or error}); choose "
            "a folder that may be written to"
        ) from error
    return size


def is_written(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> bool:
    """Whether ``path`` has the very header and the size of what :func:`write_streaming` would
    write there; the tensors' values are not read."""
    path = Path(path)
    header = _header(shapes, dtype, metadata)
    try:
        with open(path, "rb") as file:
            return file.read(len(header)) == header and path.stat().st_size == _size(
                header, shapes, dtype
            )
    except OSError:
        return False


def _header(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str]
) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, shape in shapes.items():
        end = position + _count(shape) * dtype.itemsize
        entries[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text


def _size(header: bytes, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of the whole file."""
    return len(header) + sum(_count(s) for s in shapes.values()) * dtype.itemsize


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size + _SPARE:
        raise CheckpointError(
            f"{path.name}: needs {size / 1e9:.2f} GB in {path.parent}, where {free / 1e9:.2f} GB "
            "are free; make room or choose another folder"
        )


def _bytes(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    origin: Callable[[str], str],
) -> memoryview:
    """A tensor's bytes in the file's dtype, refusing values that the dtype cannot hold."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
    stored = tensor.to(dtype).contiguous()
    if not bool(stored.isfinite().all()):
        reason = (
            f"has values beyond {torch.finfo(dtype).max:g}, the largest of {NAMES[dtype]}; choose "
            "bf16"
            if bool(tensor.float().isfinite().all())
            else f"has values that are not finite; {origin(name)} is damaged, get it again"
        )
        raise CheckpointError(f"{name}: {reason}")
    return stored.reshape(-1).view(torch.uint8).numpy().data
