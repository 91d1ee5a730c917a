"""What stage 1 begins with once a base has come further than the shipped one."""

from __future__ import annotations

from pathlib import Path

from anystory_core.mini.config import CONFIG
from anystory_core.training.initial import init_from_unet
from anystory_core.weights.checkpoint import save_model
from anystory_core.weights.model import build_model

from ..networks.base import load_base

START_FILE = "start.safetensors"
_REFERENCE = ("reference_net", "reference_projections")


def write_start(work: Path) -> Path:
    """``work/start.safetensors``: a reference branch that begins from the folder's base, which has
    learned to read references by itself, and the CLIP branch that the base learned with; for stage
    1's ``--start-file``."""
    base = load_base(work)
    references = build_model(CONFIG, _REFERENCE)
    init_from_unet(references, base.unet.state_dict())
    file = work / START_FILE
    save_model(file, {**base.clip.state_dict(), **references.state_dict()}, CONFIG)
    return file
