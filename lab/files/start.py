"""What stage 1 begins with once a base has come further than the shipped one."""

from __future__ import annotations

from pathlib import Path

import torch

from anystory_core.training.initial import init_from_unet
from anystory_core.weights.checkpoint import load_model, save_model
from anystory_core.weights.model import build_model

from ..networks.base import load_unet
from ..stages import SUBJECT_FILE

START_FILE = "start.safetensors"
_REFERENCE = ("reference_net", "reference_projections")


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
