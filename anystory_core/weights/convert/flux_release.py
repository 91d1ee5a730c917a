"""Opening the authors' file for FLUX, ``anystory_flux.bin``.

It is a ``torch.save`` of ``{"ref": {...}, "redux": {...}, "router": {...}}`` with tensors by name:
a zip of pickled names and raw numbers. It is read by PyTorch's weights-only reader, which builds
tensors and plain containers and runs nothing else; that reader is safe from PyTorch 2.6 on, so
older ones are refused. Only this converter ever opens a pickle.
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

GROUPS = ("ref", "redux", "router")
SAFE_SINCE = (2, 6)
_EXPECTED = "expected the authors' anystory_flux.bin"
REPORT = (
    "Nobody of this project has seen the authors' file: if its SHA-256 is the one on its page, "
    "please report this message"
)
_AGAIN = "get it again and compare its size and SHA-256 with those of the page it came from"


@dataclass(frozen=True)
class Release:
    """The tensors of the file by group and name. They are mapped from the disk, not read."""

    path: Path
    groups: Mapping[str, Mapping[str, Tensor]]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For messages."""
        return self.path.name


def open_release(path: Path) -> Release:
    """Open the file. CheckpointError: PyTorch is too old, the file is damaged, holds code, or is
    something else."""
    version = torch.__version__
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < SAFE_SINCE:
        raise CheckpointError(
            f"{path.name}: is a pickle, which PyTorch {version} cannot read safely; update to "
            f"PyTorch {SAFE_SINCE[0]}.{SAFE_SINCE[1]} or newer for the conversion"
        )
    _check_zip(path)
    return _checked(path, _read(path))


def _check_zip(path: Path) -> None:
    """Every byte against the sums that the zip holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path.name}: cannot be opened ({reason})") from error
    # The library raises errors of many kinds on damaged bytes.
    except Exception as error:
        raise CheckpointError(
            f"{path.name}: not a file of torch.save, cut off, or damaged ({error}); {_EXPECTED}; "
            f"{_AGAIN}"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path.name}: its part {damaged} is damaged; {_AGAIN}")


def _read(path: Path) -> object:
    """What the weights-only reader makes of the file."""
    try:
        return cast(object, torch.load(str(path), map_location="cpu", weights_only=True, mmap=True))
    # The reader raises errors of many kinds on what it does not know or cannot follow.
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path.name}: PyTorch's weights-only reader refuses it "
            f"({reason[0][:200] if reason else type(error).__name__}); it is damaged, or holds "
            f"code; {_EXPECTED}; {_AGAIN}"
        ) from error


def _checked(path: Path, content: object) -> Release:
    """A table of three tables of tensors by name."""
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path.name}: holds a {type(content).__name__}, expected a table of {list(GROUPS)}; "
            f"{_EXPECTED}"
        )
    table = cast("dict[Any, Any]", content)
    missing = [group for group in GROUPS if not isinstance(table.get(group), dict)]
    if missing:
        raise CheckpointError(
            f"{path.name}: holds {sorted(map(str, table))[:5]}, {missing} missing; {_EXPECTED}"
        )
    notes: list[str] = []
    extra = sorted(str(name) for name in table if name not in GROUPS)
    if extra:
        notes.append(f"{path.name}: {extra[:3]} beside the known groups is left out")
    groups: dict[str, dict[str, Tensor]] = {}
    for group in GROUPS:
        groups[group] = {}
        for name, tensor in cast("dict[Any, Any]", table[group]).items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(
                    f"{path.name}: entry {name!r} of {group!r} is a {type(tensor).__name__}, "
                    "expected a tensor with a name"
                )
            if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
                raise CheckpointError(
                    f"{path.name}: tensor {name} of {group!r} is {tensor.dtype}, expected plain "
                    "floats"
                )
            groups[group][name] = tensor
    return Release(path, groups, tuple(notes))
