"""The shipped files as modules of training: what :mod:`..evaluate` can measure, and what the recipe
can go on from on a machine that has nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from anystory_core.bases.sdxl.names import ldm_to_diffusers
from anystory_core.bases.sdxl.prediction import Prediction, prediction_of_file
from anystory_core.mini.config import CONFIG, VISION
from anystory_core.mini.weights import FOLDER
from anystory_core.training.initial import ROUTER_PARTS
from anystory_core.weights.checkpoint import load_model, save_model
from anystory_core.weights.model import PARTS

from ..networks import base, clip, vae
from ..networks.telling import TaughtBase
from ..networks.text import build_text
from ..phase import Phase
from ..stages import SUBJECT_FILE
from .carried import read_base
from .half import read_wide

_ROUTER = tuple(PARTS[part] for part in ROUTER_PARTS)


@dataclass(frozen=True)
class Shipped:
    """All parts below AnyStory, widened to float32. ``ids``: tokens that have rows in ``text``;
    ``prediction``: what the U-Net's file says that it predicts."""

    unet: Any
    vae: Any
    text: Any
    vision: Any
    ids: list[int]
    prediction: Prediction


def read_modules(folder: Path = FOLDER) -> Shipped:
    """Read the files that :mod:`.export` writes. FileNotFoundError when one is missing."""

    def read(part: str) -> dict[str, Tensor]:
        return read_wide(folder / f"{part}.safetensors")

    unet, host = base.build_unet(), read("unet")
    prediction = prediction_of_file(host, {})
    names = ldm_to_diffusers(CONFIG)
    unet.load_state_dict({name: host[key] for key, name in names.items()})
    autoencoder, host = vae.build_vae(), read("vae")
    fixed = set(vae.host_state({}))
    state: dict[str, Tensor] = {}
    for name, tensor in autoencoder.state_dict().items():
        (key,) = set(vae.host_state({name: tensor})) - fixed
        state[name] = host[key]
    autoencoder.load_state_dict(state)
    packed = read("clip_text")
    ids = [int(i) for i in packed.pop("token_ids")]
    text = build_text(ids)
    text.load_state_dict(packed)
    vision: Any = cast(Any, CLIPVisionModelWithProjection)(CLIPVisionConfig(**VISION))
    vision.load_state_dict(read("clip_vision"))
    return Shipped(unet, autoencoder, text, vision, ids, prediction)


def restore(work: Path, folder: Path = FOLDER, base_file: Path | None = None) -> None:
    """Write the phases' files from the shipped ones, so that training goes on from them: VAE and
    CLIP count as done, the decoder and the base begin new schedules, the base predicts what it did,
    and stage 2 finds stage 1's file. With ``base_file`` (:func:`~.carried.write_base`) the base
    goes on from that, with the shipped CLIP branch when it was carried without one. ValueError when
    ``work`` holds a base, RuntimeError when the file lacks other tensors."""
    if (work / "base.state.pt").exists():
        raise ValueError(f"{work} holds a trained base already; choose an empty folder")
    shipped = read_modules(folder)
    work.mkdir(parents=True, exist_ok=True)
    (work / "vocabulary.json").write_text(json.dumps(shipped.ids))
    torch.save(shipped.vae.state_dict(), work / "vae.whitened.pt")
    whole = clip.Clip(shipped.ids)
    whole.vision, whole.text = shipped.vision, shipped.text
    _begin(vae.phase(work), shipped.vae, vae.phase(work).steps)
    _begin(vae.decoder_phase(work), shipped.vae.decoder, 0)
    _begin(clip.phase(work), whole, clip.phase(work).steps)
    anystory = load_model(folder / "anystory.safetensors", dtype=torch.float32)
    taught, prediction = TaughtBase(shipped.unet, CONFIG), shipped.prediction
    taught.clip.copy_from(anystory)
    if base_file is not None:
        tensors, prediction = read_base(base_file)
        branch = {n: t for n, t in taught.state_dict().items() if n.startswith("clip.")}
        taught.load_state_dict(tensors if branch.keys() & tensors.keys() else {**branch, **tensors})
    base.write_prediction(work, prediction)
    _begin(base.phase(work, 1), taught, 0)
    subject = {n: t for n, t in anystory.state_dict().items() if not n.startswith(_ROUTER)}
    save_model(work / SUBJECT_FILE, subject, anystory.config)


def _begin(phase: Phase, module: Any, step: int) -> None:
    state = module.state_dict()
    whole = {"weights": state, "average": state, "step": step, "seconds": 0.0}
    torch.save(whole, phase.state_file)
