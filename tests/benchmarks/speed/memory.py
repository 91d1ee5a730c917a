"""Bytes that a run holds on the load device above the plain model, counted tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .setting import Bench, Step, core

GIB = 2**30


def tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that can be reached through dataclasses, modules and containers, once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        for part in (*value.parameters(), *value.buffers()):
            yield from tensors(part, seen)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part, seen)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part, seen)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from tensors(getattr(value, entry.name), seen)


def size(value: Any) -> int:
    """Bytes of the storages that ``value`` keeps alive; views of one storage count once."""
    storages = [t.untyped_storage() for t in tensors(value)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def measure(bench: Bench) -> dict[str, Any]:
    """GiB per part while N = 1, 2, 3 subjects are sampled with."""
    table: dict[str, Any] = {}
    models = {str(n): bench.patched(n, fixed=False) for n in (1, 2, 3)}

    def use(_: dict[str, Step]) -> None:
        for n in (1, 2, 3):
            run = bench.prepared[n].run
            routers = size(bench.anystory.model.routers)
            clip = size([site.clip for site in run.conditions])
            reference = size([site.reference for site in run.conditions])
            source = size(run.source) - routers
            table[f"N = {n}"] = {
                "keys and values, CLIP branch": clip / GIB,
                "keys and values, reference branch": reference / GIB,
                "routing keys": source / GIB,
                "routers": routers / GIB,
                "per subject picture": (clip + reference + source) / n / GIB,
                "ReferenceNet and projections": held(bench, run) / GIB,
            }

    bench.with_steps(models, (512, 512), use)
    return table


def held(bench: Bench, state: Any) -> int:
    """Bytes of the ReferenceNet and of the projections that a run still refers to. (That the host
    takes them off a device is tested; here load and offload device are one.)"""
    model = bench.anystory.model
    parts = (model.reference_net, model.projections.clip, model.projections.reference)
    ours = {t.untyped_storage().data_ptr() for part in parts for t in tensors(part)}
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors((state.conditions, state.source))
    }
    return sum(count for at, count in kept.items() if at in ours)


def gpu_1024(bench: Bench, subjects: int = 2) -> dict[str, float]:
    """GiB by line at 1024x1024 in half precision with guidance, with the host's offloading: while
    sampling only the U-Net, the routers and the run's keys and values are on the device."""
    config = bench.anystory.model.config
    unet = size(bench.unet.model.diffusion_model)
    state = bench.prepared[subjects].run
    rows, side = 2, 128
    site = max(core("sites").build_sites(config.unet), key=lambda s: (side // s.stride) ** 2)
    tokens = (side // site.stride) ** 2
    wide = config.unet.model_channels
    # Largest layer: the feed-forward of the highest attention level, hidden state twice as wide for
    # the gate; or the last residual block, whose input is two skips wide at full latent size.
    feed_forward = rows * tokens * site.channels * (1 + 8 + 4) * 2
    residual = rows * side * side * wide * (2 + 2 + 1 + 1) * 2
    skips = sum(rows * (side // 2**level) ** 2 * wide * m * 3 * 2
                for level, m in enumerate(config.unet.channel_mult))  # fmt: skip
    lines = {
        "U-Net weights": unet,
        "routers": size(bench.anystory.model.routers),
        "keys and values of the subjects": size(state.conditions),
        "skip connections": skips,
        "largest layer": max(feed_forward, residual),
        "sorted queries and outputs of one block": 6 * rows * tokens * site.channels * 2,
    }
    out = {name: value / GIB for name, value in lines.items()}
    return {**out, "sum": sum(out.values())}
