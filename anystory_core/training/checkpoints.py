"""Checkpoints that are whole or absent: written beside, renamed when complete, the last k kept."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import AnyStoryError

_NAME = re.compile(r"step-(\d{8})")


class CheckpointFolderError(AnyStoryError):
    """Checkpoints cannot be written where the run wants them."""


def newest(folder: Path) -> tuple[int, Path] | None:
    """(step, path) of the newest whole checkpoint, or None."""
    found = _whole(folder)
    return found[-1] if found else None


def write(folder: Path, step: int, keep: int, fill: Callable[[Path], None]) -> Path:
    """Let ``fill`` write into a new folder, then make it the checkpoint of ``step``.

    CheckpointFolderError when the disk is full or the folder cannot be written; what was there
    before stays, and nothing half-written stays."""
    partial = folder / f"step-{step:08d}.partial"
    target = folder / f"step-{step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        for root, _, files in os.walk(partial):
            for name in files:
                with open(os.path.join(root, name), "rb+") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            shutil.rmtree(partial)
        raise CheckpointFolderError(
            f"run.folder: the checkpoint of step {step} cannot be written to {folder} ({error}); "
            "free space or name another folder, then start the run again: it goes on from its "
            "last checkpoint"
        ) from error
    for _, old in _whole(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def _whole(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)
