"""Opening the authors' file for FLUX, ``anystory_flux.bin``.

It is a ``torch.save`` of ``{"ref": {...}, "redux": {...}, "router": {...}}`` with tensors by name:
a zip of pickled names and raw numbers (:mod:`.pickles`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import CheckpointError
from .pickles import read_pickle

GROUPS = ("ref", "redux", "router")
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
    return _checked(path, read_pickle(path, f"{_AGAIN}; {_EXPECTED}"))


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
