"""Checkpoints that are whole or absent: written beside, renamed when complete, the last k kept."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import AnyStoryError
from ..tensor_files import open_tensors

# What torch, safetensors and accelerate raise at files that are cut off, missing or another run's.
_UNREADABLE = (
    OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError,
)  # fmt: skip
_NAME = re.compile(r"step-(\d{8})")


class CheckpointFolderError(AnyStoryError):
    """What a run writes cannot be written where it is to go."""


@contextlib.contextmanager
def writing(field: str, what: str, folder: Path) -> Generator[None, None, None]:
    """What disks and folders refuse, as a CheckpointFolderError that names the setting ``field``.

    For blocks that do nothing but write: torch reports a full disk as a RuntimeError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointFolderError(
            f"{field}: {what} cannot be written to {folder} ({error}); free space or name another "
            "folder, then start the run again: it goes on from its last checkpoint"
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Generator[None, None, None]:
    """What a damaged checkpoint, or another run's, makes its readers raise, as a
    CheckpointFolderError that says what to do."""
    try:
        yield
    except CheckpointFolderError:
        raise
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointFolderError(
            f"run.folder: {path} cannot be gone on from ({reason}): it is damaged, or of a run "
            "with other settings. Remove it to go on from the one before, or name another folder"
        ) from error


def newest(folder: Path) -> tuple[int, Path] | None:
    """(step, path) of the newest whole checkpoint, or None."""
    found = all_whole(folder)
    return found[-1] if found else None


def write(folder: Path, step: int, keep: int, fill: Callable[[Path], None]) -> Path:
    """Let ``fill`` write into a new folder, then make it the checkpoint of ``step``, which must not
    be there yet.

    CheckpointFolderError when the disk is full or the folder cannot be written; what was there
    before stays, and nothing half-written stays."""
    target = folder / f"step-{step:08d}"
    unfinished = folder / f"{target.name}.partial"
    try:
        with writing("run.folder", f"the checkpoint of step {step}", folder):
            for cut_off in folder.glob("step-*.partial"):  # by the end of an earlier process
                shutil.rmtree(cut_off, ignore_errors=True)
            unfinished.mkdir(parents=True)
            fill(unfinished)
            for root, _, files in os.walk(unfinished):
                for name in files:
                    with open(os.path.join(root, name), "rb+") as file:
                        os.fsync(file.fileno())
            os.replace(unfinished, target)
            for _, old in all_whole(folder)[:-keep]:
                shutil.rmtree(old)
    except CheckpointFolderError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def read_weights(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of these names and shapes from a checkpoint's file, which may hold more.

    CheckpointFolderError when it is another run's: a tensor is missing or has another shape."""
    found: dict[str, Tensor] = {}
    with open_tensors(path) as file:
        stored = set(file.keys())
        for name, shape in shapes.items():
            tensor = file.get_tensor(name) if name in stored else None
            if tensor is None or tensor.shape != shape:
                got = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise CheckpointFolderError(
                    f"run.folder: {path.parent} is another run's checkpoint ({name}: expected "
                    f"shape {tuple(shape)}, got {got}); name another folder"
                )
            found[name] = tensor
    return found


def all_whole(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every whole checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)
