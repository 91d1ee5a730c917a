"""Core modules under the host's memory management.

Each module of a weights file is a ModelPatcher of its own, built from the host's casting layers, so
it may be stored in fp8 or fp16, be partly offloaded, and is on the load device only while it works.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import torch
from torch import nn

from ...anystory_core.bases.flux.model import FluxModel
from ...anystory_core.weights.model import AnyStoryModel

OPERATIONS = comfy.ops.manual_cast


def make_patcher(module: nn.Module) -> Any:
    """A ModelPatcher around a module, of the class that this host uses for its own models."""
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = kind(
        module, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
    )
    # Where the host spreads conds over several devices it makes each of them a module of its own.
    patcher.cached_patcher_init = (_copied, (module,))
    return patcher


def _copied(module: nn.Module, *, disable_dynamic: bool = False) -> Any:
    """A patcher around a copy of ``module``; ``disable_dynamic``: of the host's plain class."""
    copied = make_patcher(copy.deepcopy(module))
    if not disable_dynamic:
        return copied
    plain = comfy.model_patcher.ModelPatcher
    return plain(copied.model, copied.load_device, copied.offload_device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What subjects are encoded in: half precision where the device is good at it."""
    if mm.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if mm.should_use_fp16(device) else torch.float32


def load(patchers: Sequence[Any], *, needed: int = 0, least: int = 0) -> None:
    """Bring modules to their load device. The host frees ``needed`` bytes there for what they will
    compute, and leaves parts of them off the device rather than fewer than ``least`` bytes."""
    mm.load_models_gpu(list(patchers), memory_required=needed, minimum_memory_required=least)


def fitting(size: int, device: torch.device) -> int:
    """How many things of ``size`` bytes the free memory of a device holds; at least one."""
    return max(1, int(mm.get_free_memory(device) // max(1, size)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host takes an error for its own "out of memory", after which it unloads models
    and says so. torch's is a RuntimeError, too."""
    newer = getattr(mm, "is_oom", None)  # also knows errors of drivers
    return bool(newer(error)) if newer is not None else isinstance(error, mm.OOM_EXCEPTION)


def number_type(module: torch.nn.Module) -> torch.dtype | None:
    """Of a network's parameters; None where it has none."""
    return next((p.dtype for p in module.parameters()), None)


def number_types(clip_vision: Any, vae: Any, clip: Any) -> dict[str, torch.dtype]:
    """What the host's networks compute in, by the inputs that they come from."""
    text = None if clip is None else number_type(clip.cond_stage_model)
    found = {
        "clip_vision": getattr(clip_vision, "dtype", None),
        "vae": getattr(vae, "vae_dtype", None),
        "clip": text,
    }
    return {name: kind for name, kind in found.items() if kind is not None}


def release(patchers: Sequence[Any]) -> None:
    """Take modules off a load device that is not the memory they live in anyway."""
    for patcher in patchers:
        if patcher.load_device == patcher.offload_device:
            continue
        keep = [m for m in mm.current_loaded_models if m.model is not patcher]
        mm.free_memory(1e30, patcher.load_device, keep_loaded=keep)


@dataclass
class ManagedAnyStory:
    """The ANYSTORY socket: a model and one ModelPatcher per module."""

    model: AnyStoryModel | FluxModel
    name: str
    patchers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for prefix, module in self.model.modules():
            if next(module.parameters(), None) is not None:
                self.patchers[prefix] = make_patcher(module)

    def get_models(self) -> list[Any]:
        """What the host may count and free with this output."""
        return list(self.patchers.values())

    def having(self, *names: str) -> list[Any]:
        """The patchers of the named modules, as far as they are there."""
        return [self.patchers[name] for name in names if name in self.patchers]
