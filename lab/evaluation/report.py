"""The table as text, and sheets of what was drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..world.render import UInt8
from .tasks import Task

SHOWN = 16  # pictures of a sheet
ACROSS = 8


def asked(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """All names, or those that some wish is or, where it is none, is a part of. ValueError names a
    wish that nothing is asked by."""
    found: set[str] = set()
    for wish in wanted:
        meant = {wish} if wish in names else {name for name in names if wish in name}
        if not meant:
            raise ValueError(f"--rows: no row is called {wish!r}; there are: {', '.join(names)}")
        found |= meant
    return [name for name in names if name in found or not wanted]


def slug(name: str) -> str:
    """A file name."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def percent(figure: Mapping[str, Any]) -> str:
    """A value with its 95 % interval: 41.2 % (36.9–45.6)."""
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f}–{high:.1f})"


def line(name: str, row: Mapping[str, Any]) -> str:
    """One row for the terminal, layers left out."""
    figures = {k: v for k, v in row["figures"].items() if not k.startswith("layer")}
    return f"{name}: " + ", ".join(f"{key} {percent(value)}" for key, value in figures.items())


def markdown(rows: Mapping[str, Any]) -> str:
    """All rows: drawn pictures by number of subjects, then routing, then its layers."""
    parts: list[str] = []
    groups: dict[str, list[str]] = {}
    for name in rows:
        groups.setdefault(name.partition(":")[0].partition(" at ")[0], []).append(name)
    for title, names in groups.items():
        found = dict.fromkeys(key for n in names for key in rows[n]["figures"])
        columns = [c for c in found if not c.startswith("layer")]
        parts.append(_table(title, columns, names, rows))
        layers = [c for c in found if c.startswith("layer") and not c.endswith("coarse")]
        if layers:
            parts.append(_table(f"{title}, layer by layer", layers, names, rows))
    return "\n".join(parts)


def _table(
    title: str, columns: Sequence[str], names: Sequence[str], rows: Mapping[str, Any]
) -> str:
    lines = [f"| {title} | {' | '.join(columns)} | samples |", "|---" * (len(columns) + 2) + "|"]
    for name in names:
        figures = rows[name]["figures"]
        cells = [percent(figures[c]) if c in figures else "" for c in columns]
        label = name.partition(": ")[2] if " at " not in name else name
        lines.append(f"| {label} | {' | '.join(cells)} | {rows[name]['samples']} |")
    return "\n".join(lines) + "\n"


def write_sheet(file: Path, tasks: Sequence[Task], pictures: Tensor) -> None:
    """The first pictures (B,3,H,W) of a row, each under its references; none of fewer than
    :data:`SHOWN`."""
    if len(tasks) < SHOWN:
        return
    columns = [_column(*shown) for shown in zip(tasks[:SHOWN], pictures[:SHOWN], strict=True)]
    rows = [
        np.concatenate(columns[start : start + ACROSS], axis=1) for start in range(0, SHOWN, ACROSS)
    ]
    Image.fromarray(np.concatenate(rows, axis=0)).save(file, quality=90)


def _column(task: Task, picture: Tensor) -> UInt8:
    """References side by side at half size, the picture below."""
    pixels: Any = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1)
    drawn = pixels.contiguous().numpy()
    side = drawn.shape[1]
    small = side // max(len(task.references), 2)
    top = np.full((small, side, 3), 255, np.uint8)
    for i, (reference, _) in enumerate(task.references):
        shown = Image.fromarray(reference).resize((small, small), Image.Resampling.BOX)
        top[:, i * small : (i + 1) * small] = np.asarray(shown)
    return np.concatenate((top, drawn), axis=0)
