"""The safetensors files of one network in a folder as diffusers and transformers write it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import CheckpointError

VARIANTS = ("", "fp16", "bf16")  # in the order in which they are taken


@dataclass(frozen=True)
class NetworkFiles:
    """Files that hold one network together. ``variant``: what its file names say, "" for none."""

    files: tuple[Path, ...]
    variant: str


def network_files(folder: Path, stem: str) -> NetworkFiles | None:
    """Of ``STEM.safetensors``, ``STEM.VARIANT.safetensors``, or the pieces that an index names;
    None when there is none of them. CheckpointError: an index names files that are not there."""
    for variant in VARIANTS:
        middle = f".{variant}" if variant else ""
        one = folder / f"{stem}{middle}.safetensors"
        if one.is_file():
            return NetworkFiles((one,), variant)
        index = folder / f"{stem}.safetensors.index{middle}.json"
        if index.is_file():
            return NetworkFiles(_pieces(index), variant)
    return None


def _pieces(index: Path) -> tuple[Path, ...]:
    try:
        table: object = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index.name}: is not JSON ({error}); get it again") from error
    listed = cast("dict[str, Any]", table).get("weight_map") if isinstance(table, dict) else None
    names = sorted({Path(str(name)).name for name in cast("dict[str, Any]", listed or {}).values()})
    files = tuple(index.parent / name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise CheckpointError(
            f"{index.parent.name}: {index.name} names {missing or 'no files'}, which are not in "
            "it; get the whole folder again"
        )
    return files
