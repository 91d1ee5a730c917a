"""A base on its way to another machine: one file in half precision, the heads that question it
and its CLIP branch included."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from anystory_core.bases.sdxl.prediction import Prediction, marks_of_file, prediction_of_file
from anystory_core.training.hosts.folder import folder_prediction

from ..networks.base import phase
from .half import read_wide, write_half

BASE_FILE = "base.safetensors"


def write_base(work: Path) -> Path:
    """``work/base.safetensors``: averaged weights as far as the ``base`` phase has come, and what
    it predicts. FileNotFoundError when it never ran."""
    file = work / BASE_FILE
    write_half({**phase(work, 1).final(), **marks_of_file(folder_prediction(work))}, file)
    return file


def read_base(file: Path) -> tuple[dict[str, Tensor], Prediction]:
    """The tensors that :func:`write_base` wrote, in float32, and what the base predicts."""
    tensors = read_wide(file)
    prediction = prediction_of_file(tensors, {})
    for mark in marks_of_file(prediction):
        del tensors[mark]
    return tensors, prediction
