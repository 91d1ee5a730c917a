"""The AnyStory modules with which a run begins: made from the U-Net, or read from files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..build import AnyStoryModel, build_model
from ..checkpoint import load_model
from ..errors import ConfigError
from .bases import Base
from .config import TrainingConfig
from .names import init_from_unet

ROUTER_PARTS = ("routing_encoder", "routers")


def copy_parts(model: AnyStoryModel, file: str, field: str) -> None:
    """Fill ``model`` from an AnyStory file that may hold more. ``field`` is named in errors:
    ConfigError when the file lacks a part or was made for other sizes."""
    source = load_model(file, dtype=torch.float32)
    missing = sorted(set(model.parts) - set(source.parts))
    if missing:
        raise ConfigError(f"{field}: {Path(file).name} lacks {missing}")
    if source.config != model.config:
        raise ConfigError(
            f"{field}: {Path(file).name} was made for {source.config.name!r} in other sizes than "
            f"this run's {model.config.name!r}"
        )
    found = {f"{part}.{k}": t for part, m in source.modules() for k, t in m.state_dict().items()}
    for part, module in model.modules():
        module.load_state_dict({k: found[f"{part}.{k}"] for k in module.state_dict()})


def build_trained_model(config: TrainingConfig, base: Base) -> AnyStoryModel:
    """The AnyStory modules of a run, initialised: from the U-Net (stage 1), or from the file of
    stage 1 with a fresh router (stage 2)."""
    torch.manual_seed(config.run.seed)
    if config.subject is not None:
        parts = ["subject_encoder", "clip_projections"] if config.subject.clip else []
        if config.subject.reference:
            parts += ["reference_net", "reference_projections"]
        model = build_model(base.config, parts)
        if config.subject.start_file:
            copy_parts(model, config.subject.start_file, "subject.start_file")
            return model
        init_from_unet(model, base.unet.state_dict())
        if config.subject.ip_adapter:
            from ..convert import load_ip_adapter

            load_ip_adapter(model, config.subject.ip_adapter)
        return model
    assert config.router is not None
    model = load_model(config.router.subject_file, dtype=torch.float32)
    if model.reference_net is not None and model.config.reference.cross_attention:
        raise ConfigError(
            "router.subject_file: its ReferenceNet reads text (converted with 'original'), which "
            "stage 2 cannot give it; convert with --reference-net simplified"
        )
    for part in ("unet", "clip", "reference"):
        own, wanted = getattr(model.config, part), getattr(base.config, part)
        if own != wanted:
            raise ConfigError(
                f"router.subject_file: made for {model.config.name!r} with {part} = {own}, the "
                f"base is {base.config.name!r} with {wanted}; give a file of this base"
            )
    if "routers" in model.parts:
        raise ConfigError("router.subject_file: it holds a router already; give the stage 1 file")
    router = dataclasses.replace(model.config.router, refine=config.router.refine)
    model.config = dataclasses.replace(model.config, router=router)
    fresh = build_model(model.config, ROUTER_PARTS)
    if config.router.start_file:
        copy_parts(fresh, config.router.start_file, "router.start_file")
    model.encoder.routing, model.routers = fresh.encoder.routing, fresh.routers
    return model
