"""The mini model as a user of public weights has it: its base as a checkpoint, its CLIP branch as
an IP-Adapter Plus file, both in the public layouts, converted by :mod:`anystory_core.convert`.

So the conversion is measured by the same evaluation as the trained weights (:mod:`..evaluate`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from anystory_core.bases.sdxl.names import LDM_PREFIX, ldm_to_diffusers
from anystory_core.errors import CheckpointError
from anystory_core.mini.config import CONFIG
from anystory_core.weights.checkpoint import load_model
from anystory_core.weights.convert.adapters import adapter_names
from anystory_core.weights.convert.conversion import REFERENCE_NETS, convert
from anystory_core.weights.model import AnyStoryModel


def checkpoint_state(unet: Any) -> dict[str, Tensor]:
    """A diffusers U-Net's tensors under the names of a single-file checkpoint."""
    state = unet.state_dict()
    return {LDM_PREFIX + ldm: state[name] for ldm, name in ldm_to_diffusers(CONFIG).items()}


def adapter_state(model: AnyStoryModel) -> dict[str, Tensor]:
    """The CLIP branch under the names of an IP-Adapter Plus file. CheckpointError: it has none."""
    encoder, projections = model.encoder.subject, model.projections.clip
    if encoder is None or projections is None:
        raise CheckpointError(
            f"AnyStory weights with {list(model.parts)}: they hold no CLIP branch, expected "
            "subject_encoder and clip_projections"
        )
    state = {adapter_names(name, None)[0]: x for name, x in encoder.state_dict().items()}
    for site in model.sites:
        for name, tensor in projections.at(site.index).state_dict().items():
            state[adapter_names(name, site)[0]] = tensor
    return state


def converted(unet: Any, model: AnyStoryModel) -> dict[str, AnyStoryModel]:
    """A converted model for each of :data:`REFERENCE_NETS`, float32 and frozen, from the base
    ``unet`` (diffusers) and the CLIP branch of ``model``."""
    found: dict[str, AnyStoryModel] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, adapter = Path(folder, "base.safetensors"), Path(folder, "adapter.safetensors")
        _save(checkpoint_state(unet), checkpoint)
        _save(adapter_state(model), adapter)
        for kind in REFERENCE_NETS:
            file = Path(folder, f"{kind}.safetensors")
            convert(
                checkpoint, adapter, file, config=CONFIG, reference_net=kind, dtype=torch.float32
            )
            found[kind] = load_model(file)
    return found


def _save(state: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
