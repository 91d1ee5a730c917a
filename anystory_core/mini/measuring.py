"""The measuring networks' file, ``weights/measuring.safetensors``: kept in the repository, so that
figures of models that were trained on different machines are seen by the same eyes. Only
:mod:`.evaluate` and the tests read it."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from .finder import Finder
from .identity import Identity
from .weights import path

FILE = path("measuring")
LARGEST = 8 * 2**20
_FINDER, _IDENTITY = "finder.", "identity."


def pack_networks(finder: Finder, identity: Identity) -> dict[str, Tensor]:
    """One state dict of both, each tensor's name begun with its network's."""
    return {
        **{_FINDER + name: tensor for name, tensor in finder.state_dict().items()},
        **{_IDENTITY + name: tensor for name, tensor in identity.state_dict().items()},
    }


def read_networks(file: Path = FILE) -> tuple[Finder, Identity]:
    """Both networks, widened to float32 and frozen. FileNotFoundError without the file."""
    state = load_file(file)
    finder, identity = Finder(), Identity()
    for module, prefix in ((finder, _FINDER), (identity, _IDENTITY)):
        own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        module.load_state_dict(own)  # copies into float32
        module.eval().requires_grad_(False)
    return finder, identity
