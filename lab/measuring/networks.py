"""The measuring networks' files, ``measuring.safetensors`` and ``outline.safetensors`` beside this
module: kept in the repository, so that figures of models that were trained on different machines
are seen by the same eyes. Only :mod:`..evaluate` and the tests read them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from anystory_core.tensor_files import read_tensors

from .finder import Finder
from .identity import Identity
from .outline import Segmenter

FILE = Path(__file__).parent / "measuring.safetensors"
LARGEST = 8 * 2**20
OUTLINE_FILE = FILE.with_name("outline.safetensors")
LARGEST_OUTLINE = 2 * 2**20


def _together(finder: Finder, identity: Identity) -> nn.ModuleDict:
    return nn.ModuleDict({"finder": finder, "identity": identity})


def pack_networks(finder: Finder, identity: Identity) -> dict[str, Tensor]:
    """One state dict of both, each tensor's name begun with its network's."""
    return _together(finder, identity).state_dict()


def read_networks() -> tuple[Finder, Identity]:
    """Both networks, widened to float32 and frozen. FileNotFoundError without the file."""
    finder, identity = Finder(), Identity()
    both = _together(finder, identity)
    both.load_state_dict(read_tensors(FILE))  # copies into float32
    both.eval().requires_grad_(False)
    return finder, identity


def read_segmenter() -> Segmenter:
    """The network of outlines, widened to float32 and frozen. FileNotFoundError without its
    file."""
    network = Segmenter()
    network.load_state_dict(read_tensors(OUTLINE_FILE))
    return network.eval().requires_grad_(False)
