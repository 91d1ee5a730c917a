"""The AnyStory modules with which a run begins: made from the U-Net, or read from files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..bases.sdxl.config import AnyStoryConfig
from ..bases.sdxl.names import ldm_to_diffusers
from ..errors import CheckpointError, ConfigError
from ..weights.checkpoint import load_model, read_header
from ..weights.convert.adapters import open_adapter
from ..weights.convert.plan import plan_tensors
from ..weights.model import AnyStoryModel, build_model
from .config import TrainingConfig
from .hosts.frozen import FrozenNetworks
from .settings import RouterSettings, SubjectSettings

ROUTER_PARTS = ("routing_encoder", "routers")


def differences(given: object, wanted: object, where: str = "") -> list[str]:
    """Where two configurations differ, as "name = given, not wanted"."""
    if dataclasses.is_dataclass(given) and dataclasses.is_dataclass(wanted):
        found: list[str] = []
        for field in dataclasses.fields(wanted):
            own = getattr(given, field.name), getattr(wanted, field.name)
            found += differences(*own, f"{where}.{field.name}" if where else field.name)
        return found
    return [] if given == wanted else [f"{where} = {given}, not {wanted}"]


def _check_base(given: AnyStoryConfig, base: AnyStoryConfig, field: str) -> None:
    """ConfigError unless a file was made for this base: U-Net, CLIP vision and references."""
    wrong = [
        line
        for part in ("unet", "clip", "reference")
        for line in differences(getattr(given, part), getattr(base, part), part)
    ]
    if wrong:
        raise ConfigError(
            f"{field}: made for {given.name!r}, this run's base is {base.name!r}: "
            f"{'; '.join(wrong)}. Give a file of this base"
        )


def copy_parts(model: AnyStoryModel, file: str, field: str) -> None:
    """Fill ``model`` from an AnyStory file that may hold more, such as the refinement of a router
    that is to go without. ``field`` is named in errors: ConfigError when the file lacks a part or
    was made for other sizes."""
    source = load_model(file, dtype=torch.float32)
    missing = sorted(set(model.parts) - set(source.parts))
    if missing:
        raise ConfigError(f"{field}: {Path(file).name} lacks {missing}")
    config = source.config
    if not model.config.router.refine:
        router = dataclasses.replace(config.router, refine=False)
        config = dataclasses.replace(config, router=router)
    wrong = [d for d in differences(config, model.config) if not d.startswith("name = ")]
    if wrong:
        raise ConfigError(
            f"{field}: {Path(file).name} was made in other sizes than this run's: "
            f"{'; '.join(wrong)}"
        )
    found = {f"{part}.{k}": t for part, m in source.modules() for k, t in m.state_dict().items()}
    for part, module in model.modules():
        module.load_state_dict({k: found[f"{part}.{k}"] for k in module.state_dict()})


def init_from_unet(model: AnyStoryModel, unet: dict[str, Tensor]) -> None:
    """Start the trained parts from the U-Net's weights (diffusers names), as in the paper.

    ReferenceNet: key by key, mask channel zero. K and V for references: the block's own attn1 maps.
    K and V for CLIP tokens: its attn2 maps."""
    with torch.no_grad():
        if model.reference_net is not None:
            table = ldm_to_diffusers(model.config)
            for name, target in model.reference_net.state_dict().items():
                source = unet[table[name]]
                if target.shape != source.shape:  # the first convolution: one more input channel
                    target.zero_()
                    target[:, : source.shape[1]].copy_(source)
                else:
                    target.copy_(source)
        for site in model.sites:
            if model.projections.clip is not None:
                _copy(model.projections.clip.at(site.index), unet, f"{site.diffusers}.attn2")
            if model.projections.reference is not None and site.index > 1:
                _copy(model.projections.reference.at(site.index), unet, f"{site.diffusers}.attn1")


def _copy(projection: Any, unet: dict[str, Tensor], path: str) -> None:
    projection.to_k.weight.copy_(unet[f"{path}.to_k.weight"])
    projection.to_v.weight.copy_(unet[f"{path}.to_v.weight"])


def with_ip_adapter_sizes(base: AnyStoryConfig, path: str | Path) -> AnyStoryConfig:
    """``base`` with an adapter file's CLIP branch. CheckpointError names another file."""
    adapter = open_adapter(Path(path), base)
    with adapter.source:
        adapter.check_face()
        config = adapter.config(base)
    if config.clip_branch.grounding is not None:
        raise CheckpointError(
            f"{Path(path).name}: it is {adapter.kind}, whose queries this training does not give a "
            "box; give IP-Adapter Plus or MIP-Adapter"
        )
    return config


def load_ip_adapter(model: AnyStoryModel, path: str | Path) -> None:
    """Start a model of an IP-Adapter Plus file's sizes from its QFormer and K and V maps.
    CheckpointError names another file; the model is then unchanged."""
    adapter = open_adapter(Path(path), model.config)
    with adapter.source:
        pieces = plan_tensors(model.config, ("subject_encoder", "clip_projections"), adapter, None)
        ready = {name: piece.make() for name, piece in pieces.items()}
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in ready.items():
            state[name].copy_(tensor)


def build_trained_model(config: TrainingConfig, base: FrozenNetworks) -> AnyStoryModel:
    """The AnyStory modules of a run, initialised: from the U-Net (stage 1), or from the file of
    stage 1 with a fresh router (stage 2)."""
    cast(Any, torch).manual_seed(config.run.seed)
    if config.subject is not None:
        return _subject_model(config.subject, base)
    assert config.router is not None
    return _router_model(config.router, base)


def _subject_model(subject: SubjectSettings, base: FrozenNetworks) -> AnyStoryModel:
    parts = ["subject_encoder", "clip_projections"] if subject.clip else []
    if subject.reference:
        parts += ["reference_net", "reference_projections"]
    sizes = base.config
    if subject.start_file:
        # Its QFormers may have other sizes: public ones have fewer queries than the paper's.
        sizes = read_header(subject.start_file).config
        _check_base(sizes, base.config, "subject.start_file")
    elif subject.ip_adapter:
        sizes = with_ip_adapter_sizes(base.config, subject.ip_adapter)
    model = build_model(sizes, parts)
    if subject.start_file:
        copy_parts(model, subject.start_file, "subject.start_file")
        if subject.reference:  # it learns to read the whole cut-out
            model.config = dataclasses.replace(model.config, references="whole")
        return model
    init_from_unet(model, base.unet.state_dict())
    if subject.ip_adapter:
        load_ip_adapter(model, subject.ip_adapter)
    return model


def _router_model(settings: RouterSettings, base: FrozenNetworks) -> AnyStoryModel:
    model = load_model(settings.subject_file, dtype=torch.float32)
    if model.reference_net is not None and model.config.reference.cross_attention:
        raise ConfigError(
            "router.subject_file: its ReferenceNet reads text (converted with 'original'), which "
            "stage 2 cannot give it; convert with --reference-net simplified"
        )
    _check_base(model.config, base.config, "router.subject_file")
    if "routers" in model.parts:
        raise ConfigError("router.subject_file: it holds a router already; give the stage 1 file")
    router = dataclasses.replace(model.config.router, refine=settings.refine)
    model.config = dataclasses.replace(model.config, router=router)
    fresh = build_model(model.config, ROUTER_PARTS)
    if settings.start_file:
        copy_parts(fresh, settings.start_file, "router.start_file")
    model.encoder.routing, model.routers = fresh.encoder.routing, fresh.routers
    return model
