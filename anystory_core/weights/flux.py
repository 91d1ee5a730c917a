"""Files of AnyStory weights for FLUX: their header, and the modules that they fill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bases.flux.config import FluxConfig
from ..bases.flux.model import PARTS, FluxModel, build_model
from ..errors import CheckpointError
from .checkpoint import Header, file_family, fill_model, read_header_as

FLUX = "flux"


def read_flux_header(path: str | os.PathLike[str]) -> Header[FluxConfig]:
    """Read and check the header of one of our files for FLUX. CheckpointError otherwise."""
    family = file_family(path)
    if family != FLUX:
        raise CheckpointError(
            f"{Path(path).name}: holds AnyStory weights for {family}, expected some for {FLUX}"
        )
    return read_header_as(path, FluxConfig.from_json, PARTS)


def load_flux_model(
    path: str | os.PathLike[str],
    *,
    operations: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> FluxModel:
    """Build what a file holds and fill it; as :func:`.checkpoint.load_model`."""
    header = read_flux_header(path)
    model = build_model(
        header.config, header.parts, operations=operations, dtype=dtype, device="meta"
    )
    return fill_model(path, header, model, dtype=dtype, device=device)
