"""Which base model a weights file is for."""

from __future__ import annotations

import os
from typing import Any

from ..anystory_core.bases.flux.model import FluxModel
from ..anystory_core.errors import CheckpointError
from ..anystory_core.weights.checkpoint import (
    SDXL,
    Header,
    file_family,
    load_model,
    read_header,
)
from ..anystory_core.weights.flux import FLUX, load_flux_model, read_flux_header
from .host.base import HostBase
from .host.flux.base import FluxBase
from .host.managed import OPERATIONS, ManagedAnyStory
from .host.sdxl.base import SDXLBase

_READ = {SDXL: (read_header, load_model), FLUX: (read_flux_header, load_flux_model)}


def base_of(anystory: ManagedAnyStory) -> HostBase:
    """The host's side of the base of these weights."""
    return FluxBase() if isinstance(anystory.model, FluxModel) else SDXLBase()


def weights_header(path: str | os.PathLike[str]) -> Header[Any]:
    """What a file says of itself. CheckpointError: it is none of ours, or for another base."""
    return _of_family(path)[0](path)


def load_weights(path: str | os.PathLike[str]) -> Any:
    """The modules of a file, of the host's casting layers."""
    return _of_family(path)[1](path, operations=OPERATIONS)


def _of_family(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    family = file_family(path)
    if family not in _READ:
        raise CheckpointError(
            f"{os.path.basename(path)}: holds AnyStory weights for {family[:30]!r}, this version "
            f"knows {sorted(_READ)}; update the node pack"
        )
    return _READ[family]
