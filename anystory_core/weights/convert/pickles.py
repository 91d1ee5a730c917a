"""Files of ``torch.save``, which many public weights are.

Such a file is a pickle, and a pickle can hold a program. It is opened here alone, by the
converter, with PyTorch's weights-only reader, which builds tensors and plain tables and runs
nothing else; that reader is safe from PyTorch 2.6 on, so older ones are refused. What draws opens
safetensors alone.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...tensor_files import FLOATS

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
SAFE_SINCE = (2, 6)
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_DEEPEST = 4  # tables inside of tables


@dataclass(frozen=True)
class PickleFile:
    """The tensors of a file by name. They are mapped from the disk, not read."""

    tensors: Mapping[str, Tensor]

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def describe(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and number type of each tensor, the type as safetensors names it."""
        return {
            name: (tuple(x.shape), _NAMES.get(x.dtype, str(x.dtype).removeprefix("torch.")))
            for name, x in self.tensors.items()
        }


def open_pickle(path: Path) -> PickleFile:
    """Open a file of ``torch.save``. Groups of tensors become prefixes of their names:
    ``{"image_proj": {"latents": x}}`` gives ``image_proj.latents``.

    CheckpointError: as :func:`read_pickle`, or the file is no table of tensors."""
    found: dict[str, Tensor] = {}
    _flatten(path.name, read_pickle(path), "", found, _DEEPEST)
    if not found:
        raise CheckpointError(f"{path.name}: holds no tensors; get it again")
    return PickleFile(found)


def read_pickle(path: Path, remedy: str = "get it again from its authors") -> object:
    """What the weights-only reader makes of a file of ``torch.save``.

    CheckpointError, which ends with ``remedy``: PyTorch is too old, the file is cut off or damaged,
    or holds code."""
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < SAFE_SINCE:
        raise CheckpointError(
            f"{path.name}: is a pickle, which PyTorch {torch.__version__} cannot read safely; "
            f"update to PyTorch {SAFE_SINCE[0]}.{SAFE_SINCE[1]} or newer, or get the file as "
            ".safetensors"
        )
    _check_zip(path, remedy)
    try:
        load = cast(Any, torch.load)
        return cast(object, load(str(path), map_location="cpu", weights_only=True, mmap=True))
    # The reader raises errors of many kinds on what it does not know or cannot follow.
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path.name}: PyTorch's weights-only reader refuses it "
            f"({lines[0][:200] if lines else type(error).__name__}): it holds code, or is damaged; "
            f"do not open it in another way, and {remedy}"
        ) from error


def _check_zip(path: Path, remedy: str) -> None:
    """CheckpointError unless it is whole, by the sums that the zip holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path.name}: cannot be opened ({reason})") from error
    # The library raises errors of many kinds on damaged bytes.
    except Exception as error:
        raise CheckpointError(
            f"{path.name}: no file of torch.save, cut off, or damaged ({error}); {remedy}"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path.name}: its part {damaged} is damaged; {remedy}")


def _flatten(name: str, content: object, prefix: str, found: dict[str, Tensor], depth: int) -> None:
    """Take the tensors of a table into ``found``; other values beside them are left out."""
    if not isinstance(content, Mapping) or depth == 0:
        kind = type(cast(object, content)).__name__
        raise CheckpointError(
            f"{name}: holds a {kind} where a table of tensors was expected; it "
            "is no file of weights"
        )
    for key, value in cast("Mapping[Any, Any]", content).items():
        if isinstance(value, Tensor):
            if not value.is_meta and value.layout == torch.strided:
                found[f"{prefix}{key}"] = value.detach()
        elif isinstance(value, Mapping):
            _flatten(name, cast(object, value), f"{prefix}{key}.", found, depth - 1)
