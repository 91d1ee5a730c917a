"""The recipe's last step: the shipped files, half precision, in the host's key names."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from anystory_core.bases.sdxl.names import ldm_to_diffusers
from anystory_core.bases.sdxl.prediction import marks_of_file
from anystory_core.mini.config import CONFIG
from anystory_core.mini.weights import PARTS, pack_text, path
from anystory_core.training.hosts.folder import folder_prediction
from anystory_core.weights.checkpoint import load_model, save_model

from ..measuring import finder, identity, outline
from ..measuring import networks as measuring
from ..networks import vae as vae_module
from ..networks.base import load_unet
from ..networks.clip import load_clip, load_vocabulary
from ..networks.vae import load_vae
from ..stages import WHOLE_FILE
from .half import holds, write_half

LARGEST_FILE = 40 * 2**20
LARGEST_PACK = 64 * 2**20


def host_states(work: Path) -> dict[str, dict[str, Tensor]]:
    """State dicts of all parts below AnyStory, by part (:data:`anystory_core.mini.weights.PARTS`),
    as hosts name them."""
    clip, _ = load_clip(work)
    unet = load_unet(work).state_dict()
    names = ldm_to_diffusers(CONFIG)
    host_unet = {host: unet[name] for host, name in names.items()}
    return {
        "unet": {**host_unet, **marks_of_file(folder_prediction(work))},
        "vae": vae_module.host_state(load_vae(work).state_dict()),
        "clip_text": pack_text(clip.text.state_dict(), load_vocabulary(work)),
        "clip_vision": clip.vision.state_dict(),
    }


def export(work: Path) -> dict[str, int]:
    """Write the files beside :mod:`anystory_core.mini.weights`, AnyStory's after stage 2, and the
    measuring networks' beside :mod:`..measuring.networks` after their phases; returns their sizes
    in bytes.

    Raises ValueError naming a file, or the pack, that is larger than it may be."""
    sizes: dict[str, int] = {}
    for part, state in host_states(work).items():
        sizes[part] = write_half(state, path(part))
        if sizes[part] > LARGEST_FILE:
            raise ValueError(f"{path(part).name}: {sizes[part]} bytes, at most {LARGEST_FILE}")
    if (work / WHOLE_FILE).exists():
        model = load_model(work / WHOLE_FILE)
        half = {name: tensor.half() for name, tensor in model.state_dict().items()}
        if not holds(path("anystory"), half):
            save_model(path("anystory"), half, CONFIG)
        sizes["anystory"] = path("anystory").stat().st_size
    total = sum(path(part).stat().st_size for part in PARTS if path(part).exists())
    if total > LARGEST_PACK:
        raise ValueError(f"mini weights: {total} bytes together, at most {LARGEST_PACK}")
    if outline.phase(work).state_file.exists():
        file = measuring.OUTLINE_FILE
        sizes["outline"] = size = write_half(outline.load_outline(work).state_dict(), file)
        if size > measuring.LARGEST_OUTLINE:
            raise ValueError(f"{file.name}: {size} bytes, at most {measuring.LARGEST_OUTLINE}")
    if finder.phase(work).state_file.exists() and identity.phase(work).state_file.exists():
        networks = finder.load_finder(work), identity.load_identity(work)
        file = measuring.FILE
        sizes["measuring"] = size = write_half(measuring.pack_networks(*networks), file)
        if size > measuring.LARGEST:
            raise ValueError(f"{file.name}: {size} bytes, at most {measuring.LARGEST}")
    return sizes
