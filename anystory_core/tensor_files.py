"""Reading and writing ``.safetensors`` files: tensor by tensor, and atomically."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError

_MAX_HEADER = 100 * 2**20  # the limit that safetensors itself sets
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors has the number in its text only
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class TensorFile(Protocol):
    """What this project uses of an open safetensors file."""

    def keys(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_tensor(self, name: str) -> Tensor: ...


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Generator[TensorFile, None, None]:
    """``safetensors.safe_open`` on the CPU: tensors are read one by one, when asked for."""
    opened: Any = safe_open(str(path), framework="pt", device="cpu")
    with opened as file:
        yield cast(TensorFile, file)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. OSError or SafetensorError: it cannot be read."""
    return cast(Any, safetensors.torch).load_file(str(path))


def read_into(path: str | os.PathLike[str], targets: Mapping[str, Tensor]) -> None:
    """Fill ``targets`` with the tensors of a file that have their names, and their shapes. OSError,
    SafetensorError or ValueError: it cannot be read.

    Read, not mapped: pages of a mapped file are resident beside the tensors that are filled from
    them, and a system that is short of memory counts both."""
    with open_tensors(path):
        header = raw_header(Path(path))  # the library has checked its offsets against the file
    with open(path, "rb", buffering=0) as file:
        begin = 8 + struct.unpack("<Q", file.read(8))[0]
        entries = {name: cast("dict[str, Any]", header[name]) for name in targets}
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
            target, dtype = targets[name].detach(), FLOATS[entries[name]["dtype"]]
            direct = target.dtype == dtype and target.device.type == "cpu"
            direct = direct and target.is_contiguous()
            read = target if direct else torch.empty(target.shape, dtype=dtype)
            view = memoryview(cast(Any, read.view(-1).view(torch.uint8)).numpy())
            file.seek(begin + entries[name]["data_offsets"][0])
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"it ends inside of tensor {name}")
                view = view[count:]
            if not direct:
                target.copy_(read)


def save_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """``safetensors.save_file`` through :func:`atomic_file`. OSError for a full disk and the like,
    which safetensors itself reports by an exception of its own."""
    with atomic_file(path) as temporary:
        try:
            cast(Any, safetensors.torch).save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            number = _OS_ERROR.search(str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Generator[str, None, None]:
    """Name of an empty file beside ``path`` that takes its name when the block ends well, and is
    removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def raw_header(path: Path) -> dict[str, object]:
    """The JSON header of a safetensors file, checked against the file's size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path.name}: not a safetensors file, or cut off ({size} bytes); get it again"
                )
            data: object = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be opened ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path.name}: its header is not JSON; get it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name}: its header is not a table; get it again")
    return cast("dict[str, object]", data)
