"""Weights files: where they lie, and what nodes make of other files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import folder_paths

from ...anystory_core.errors import AnyStoryError, CheckpointError
from ...anystory_core.file_names import EXTENSION, check_name
from ...anystory_core.weights.convert.target import Converted, Progress
from . import ids

folder_paths.add_model_folder_path(
    ids.FOLDER, os.path.join(folder_paths.models_dir, ids.FOLDER), is_default=True
)
# Without an explicit set of extensions the host lists every file of the folder.
folder_paths.folder_names_and_paths[ids.FOLDER] = (
    folder_paths.folder_names_and_paths[ids.FOLDER][0],
    {".safetensors"},
)


def weights_files() -> list[str]:
    """What lies in models/anystory, but for the saved subjects."""
    names = folder_paths.get_filename_list(ids.FOLDER)
    return [name for name in names if Path(name).parts[0] != ids.SUBJECTS]


def source_path(folder: str, name: str, shown: str | None = None) -> Path:
    """A file in one of the host's folders, which messages call models/``shown``. CheckpointError
    unless it is there."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise CheckpointError(
            f"{name!r} is not in models/{shown or folder}; copy it there and refresh the node list"
        )
    return Path(path)


def output_path(name: str) -> Path:
    """Where weights of this name are written: the first models/anystory. AnyStoryError: the name
    is none."""
    return Path(folder_paths.get_folder_paths(ids.FOLDER)[0]) / (check_name(name) + EXTENSION)


def made_with_progress(make: Callable[[Progress], Converted]) -> tuple[Converted, str]:
    """Run a conversion under the node's bar, which can be cancelled; also what it made, in
    words."""
    bar = comfy.utils.ProgressBar(1)

    def progress(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    done = make(progress)
    bar.update_absolute(1, 1)
    text = f"{done.path.name}: {done.size / 1e9:.2f} GB, {', '.join(done.parts)}"
    if done.kept:
        text += "; kept, it was made from the same files in the same way"
    return done, text


def state_of(name: str, sources: Callable[[], tuple[Path, ...]]) -> Any:
    """Changes with the sources of a file of this name, and when that file is gone."""
    try:
        made, states = output_path(name).is_file(), [path.stat() for path in sources()]
    except (AnyStoryError, OSError):
        made, states = False, []  # execute says what is wrong
    return [(state.st_size, state.st_mtime_ns) for state in states], made
