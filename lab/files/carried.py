"""A base on its way to another machine: one file in half precision, the heads that question it
included. And what stage 1 begins with once a base has come further than the shipped one."""

from __future__ import annotations

from pathlib import Path

import torch

from anystory_core.bases.sdxl.prediction import Prediction, marks_of_file, prediction_of_file
from anystory_core.mini.config import CONFIG
from anystory_core.tensor_files import read_tensors, save_tensors
from anystory_core.training.hosts.folder import folder_prediction
from anystory_core.training.initial import init_from_unet
from anystory_core.weights.checkpoint import load_model, save_model
from anystory_core.weights.model import build_model

from ..networks.base import build_unet, load_unet, phase
from ..networks.telling import TaughtBase
from ..stages import SUBJECT_FILE

BASE_FILE = "base.safetensors"
START_FILE = "start.safetensors"
_REFERENCE = ("reference_net", "reference_projections")


def write_base(work: Path) -> Path:
    """``work/base.safetensors``: averaged weights as far as the ``base`` phase has come, and what
    it predicts. FileNotFoundError when it never ran."""
    file = work / BASE_FILE
    half = {name: tensor.half() for name, tensor in phase(work, 1).final().items()}
    save_tensors(file, {**half, **marks_of_file(folder_prediction(work))}, {})
    return file


def read_base(file: Path) -> tuple[TaughtBase, Prediction]:
    """What :func:`write_base` wrote, in float32. RuntimeError for another file's tensors."""
    tensors = read_tensors(file)
    prediction = prediction_of_file(tensors, {})
    for mark in marks_of_file(prediction):
        del tensors[mark]
    base = TaughtBase(build_unet(), CONFIG)
    base.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return base, prediction


def write_start(work: Path) -> Path:
    """``work/start.safetensors``: the AnyStory weights of ``restore`` with a reference branch that
    begins from the folder's base, which has learned to read references by itself; for stage 1's
    ``--start-file``."""
    model = load_model(work / SUBJECT_FILE, dtype=torch.float32)
    anew = build_model(model.config, _REFERENCE)
    init_from_unet(anew, load_unet(work).state_dict())
    file = work / START_FILE
    save_model(file, {**model.state_dict(), **anew.state_dict()}, model.config)
    return file
