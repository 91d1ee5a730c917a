"""The parts below AnyStory as a diffusers folder, which :mod:`anystory_core.training` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import CLIPTextConfig, CLIPTextModel

from anystory_core.mini.config import TEXT
from anystory_core.mini.weights import full_table, pack_text
from anystory_core.training.hosts.folder import folder_prediction

from ..networks.base import load_unet, write_prediction
from ..networks.clip import load_clip, load_vocabulary
from ..networks.vae import load_vae


def write_base_folder(work: Path) -> Path:
    """``work/base`` with unet/, vae/, text_encoder/ (CLIP's whole table of tokens) and
    image_encoder/, from the phases' averaged weights, and scheduler/, which says what the U-Net
    predicts."""
    target = work / "base"
    clip, _ = load_clip(work)
    ids = load_vocabulary(work)
    load_unet(work).save_pretrained(target / "unet")
    write_prediction(target, folder_prediction(work))
    load_vae(work).save_pretrained(target / "vae")
    clip.vision.save_pretrained(target / "image_encoder")
    text: Any = cast(Any, CLIPTextModel)(CLIPTextConfig(**TEXT))
    state = full_table(pack_text(clip.text.state_dict(), ids))
    prefix = "text_model."
    inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    getattr(text, "text_model", text).load_state_dict(inner, strict=True)  # flat in transformers 5
    text.save_pretrained(target / "text_encoder")
    return target
