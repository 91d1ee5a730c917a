"""A folder as diffusers saves a pipeline -> the networks of a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

from ...bases.sdxl.config import AnyStoryConfig
from ...bases.sdxl.prediction import Prediction, prediction_of_scheduler
from ...errors import ConfigError, ModelMismatchError
from ...weights.folders import network_files
from ..libraries import library


def check_folder(path: Path) -> None:
    """ConfigError unless it is laid out as a pipeline."""
    for name in ("unet", "vae", "text_encoder"):
        if not (path / name / "config.json").exists():
            raise ConfigError(f"base.path: {path} has no {name}/config.json; see docs/training.md")


def load_folder(path: Path) -> tuple[Any, Any, list[Any]]:
    """(U-Net, VAE, text encoders) of a folder. ConfigError names what is missing or unreadable."""
    diffusers, transformers = library("diffusers"), library("transformers")
    unet = _pretrained(diffusers.UNet2DConditionModel, path / "unet", "base.path")
    kind = str(_settings(path / "vae").get("_class_name"))
    vae = _pretrained(getattr(diffusers, kind, None), path / "vae", "base.path")
    encoders: list[Any] = []
    for folder in ("text_encoder", "text_encoder_2"):
        if (path / folder).is_dir():
            # With a projection or without, as the folder's config.json says.
            names = _settings(path / folder).get("architectures") or ["CLIPTextModel"]
            kind = getattr(transformers, str(names[0]), None)
            encoders.append(_pretrained(kind, path / folder, "base.path"))
    return unet, vae, encoders


def _settings(path: Path) -> dict[str, Any]:
    """A JSON file, or a folder's config.json."""
    file = path if path.suffix == ".json" else path / "config.json"
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"base.path: {file} cannot be read ({error}); get it again") from error
    if not isinstance(table, dict):
        raise ConfigError(f"base.path: {file} holds no table; get it again")
    return cast("dict[str, Any]", table)


def _pretrained(kind: Any, path: Path, field: str) -> Any:
    """``kind.from_pretrained(path)``, where a missing tensor is an error and no random weight."""
    if kind is None:
        raise ConfigError(f"{field}: {path}/config.json names a class that is not known")
    stem = "model" if kind.__module__.startswith("transformers.") else "diffusion_pytorch_model"
    found = network_files(path, stem)
    if found is None:
        raise ConfigError(
            f"{field}: {path} holds no {stem}.safetensors, nor one of variant fp16 or bf16; get "
            "the folder's safetensors files (.bin files are never opened)"
        )
    try:
        model, info = kind.from_pretrained(
            path,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            variant=found.variant or None,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(f"{field}: {path} cannot be read ({detail}); get it again") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"{field}: {path} lacks {len(missing)} tensors, such as {missing[0]}; get it again"
        )
    return model


def folder_prediction(folder: Path) -> Prediction:
    """What the pipeline's scheduler says that the U-Net predicts. ConfigError: there is none."""
    settings = folder / "scheduler" / "scheduler_config.json"
    if not settings.is_file():
        raise ConfigError(
            f"base.path: {folder.name} has no scheduler/scheduler_config.json, which would say "
            "what its U-Net predicts; set base.prediction to 'epsilon' (SDXL and most of its "
            "kind), 'v', or 'v_zero_snr'"
        )
    return prediction_of_scheduler(_settings(settings))


def load_clip_vision(path: Path, config: AnyStoryConfig) -> Any:
    """transformers' CLIP vision model of a folder. ModelMismatchError: it has other sizes."""
    kind = library("transformers").CLIPVisionModelWithProjection
    model = _pretrained(kind, path, "base.clip_vision")
    got = (model.config.hidden_size, model.config.num_hidden_layers, model.config.image_size)
    wanted = (config.clip.width, config.clip.layers, config.clip.image_size)
    if got != wanted:
        raise ModelMismatchError(
            f"base.clip_vision: {path} has width, layers, picture size {got}, expected {wanted}"
        )
    return model
