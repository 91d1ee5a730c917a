"""Weights files of a run: at its end, or of any checkpoint on the way.

python -m anystory_core.training export FOLDER [--step N] [--average | --no-average]
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import ConfigError
from ..tensor_files import read_tensors
from ..weights.checkpoint import save_model
from ..weights.merge import merge_files
from . import checkpoints
from .provenance import Provenance

AVERAGE = "average.safetensors"  # in a checkpoint
WEIGHTS = "model.safetensors"
PROVENANCE = "run.json"


def write_weights(tensors: dict[str, Tensor], made: Provenance, folder: Path) -> Path:
    """Write what a stage trained to ``folder``; after stage 2 also the file joined with stage 1's.
    Returns the file that LoadAnyStory should read."""
    path = folder / f"anystory_{made.stage}.safetensors"
    save_model(path, tensors, made.anystory_config(), metadata=made.header)
    if made.subject_file is None:
        return path
    result = folder / "anystory.safetensors"
    merge_files((made.subject_file, path), result)
    return result


def export_checkpoint(folder: Path, step: int | None, average: bool | None) -> Path:
    """Write the weights of a run's checkpoint, the newest one's by default, to ``folder/export``;
    ``average`` None: the moving average where there is one. ConfigError: there is no such."""
    found = checkpoints.all_whole(folder / "checkpoints")
    steps = [number for number, _ in found]
    if not found:
        raise ConfigError(f"export: {folder} holds no checkpoint; name the run.folder of a run")
    if step is not None and step not in steps:
        raise ConfigError(f"export: no checkpoint of step {step}, expected one of {steps}")
    path = dict(found)[steps[-1] if step is None else step]
    averaged = (path / AVERAGE).exists() if average is None else average
    if averaged and not (path / AVERAGE).exists():
        raise ConfigError("export: the run keeps no average; set optimiser.ema, or leave --average")
    with checkpoints.reading(path):
        made = Provenance.read(path / PROVENANCE)
        tensors = read_tensors(path / (AVERAGE if averaged else WEIGHTS))
    kind = "-average" if averaged else ""
    target = folder / "export" / f"step-{made.step:08d}{kind}"
    target.mkdir(parents=True, exist_ok=True)
    return write_weights({n: t.float() for n, t in tensors.items()}, made, target)
