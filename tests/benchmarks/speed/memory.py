"""Bytes that a run holds on the load device above the plain model, counted tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .alive import Alive
from .operations import WithoutProducts
from .setting import Bench, Step, core, host

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
    models = {str(n): bench.patched(n, fixed=False, preparing=WithoutProducts) for n in (1, 2, 3)}

    def use(_: dict[str, Step]) -> None:
        for n in (1, 2, 3):
            run = bench.prepared[n]
            clip = size([site.clip for site in run.conditions])
            reference = size([site.reference for site in run.conditions])
            folded = folded_maps(run)
            source = size(run.source) - folded
            table[f"N = {n}"] = {
                "keys and values, CLIP branch": clip / GIB,
                "keys and values, reference branch": reference / GIB,
                "routing keys": source / GIB,
                "routers' folded maps, once a run": folded / GIB,
                "per subject picture": (clip + reference + source) / n / GIB,
                "ReferenceNet, projections and routers": held(bench, run) / GIB,
            }

    bench.with_steps(models, (512, 512), use)
    return table


def folded_maps(run: Any) -> int:
    """Bytes of what the routers fold when a run starts, whatever the number of subjects."""
    folded = [keys.refinement for keys in run.source.keys.values()]
    return size([(each.update, each.value, each.own, each.numbers) for each in folded])


def held(bench: Bench, state: Any) -> int:
    """Bytes of the ReferenceNet, the projections and the routers that a run still refers to.

    Load and offload device are one here; tests/host/test_load_device.py shows that the host takes
    them off a load device of its own."""
    model = bench.anystory.model
    projections = model.projections
    parts = (model.reference_net, projections.clip, projections.reference, model.routers)
    ours = {t.untyped_storage().data_ptr() for part in parts for t in tensors(part)}
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors((state.conditions, state.source))
    }
    return sum(count for at, count in kept.items() if at in ours)


def gpu_1024(bench: Bench, subjects: int = 2) -> dict[str, Any]:
    """GiB by line at 1024x1024 in half precision with guidance, as on a GPU: one masked call per
    block, fused attention, and while sampling only the U-Net and the run's keys and values on the
    device (the host offloads the rest). Activations are those of a step's tensors
    when they are the most."""
    alive = {"plain": Alive(), "N": Alive()}
    patched = bench.patched(subjects, fixed=False, preparing=WithoutProducts)
    models = {"plain": bench.unet.clone(), "N": patched}
    attention = host("comfy.ldm.modules.attention")
    names = ("optimized_attention", "optimized_attention_masked")
    fused = dict.fromkeys(names, attention.attention_pytorch)

    def use(steps: dict[str, Step]) -> None:
        with (
            mock.patch.object(core("injection.call"), "by_region", lambda q: False),
            mock.patch.multiple(attention, **fused),
        ):
            for name, step in steps.items():
                with WithoutProducts():
                    step()  # the first step of a run joins keys and values
                with WithoutProducts(), alive[name]:
                    step()

    bench.with_steps(models, (1024, 1024), use)
    run = bench.prepared[subjects]
    lines = {
        "U-Net weights": size(bench.unet.model.diffusion_model),
        "routers' folded maps": folded_maps(run),
        "keys and values, CLIP branch": size([site.clip for site in run.conditions]),
        "keys and values, reference branch": size([site.reference for site in run.conditions]),
        "activations": alive["N"].most,
        "the mask again for each head, where a kernel asks for it": _masks_per_head(bench, run),
    }
    table: dict[str, Any] = {name: value / GIB for name, value in lines.items()}
    table["sum"] = sum(table.values())
    table["activations of the plain step"] = alive["plain"].most / GIB
    largest = alive["N"].largest(8)
    table["largest of the activations"] = {name: value / GIB for name, value in largest}
    return table


def _masks_per_head(bench: Bench, run: Any, latent: int = 128, width: int = 2) -> int:
    """Bytes of the largest bias matrix (Eq. 7) of the conditional row, copied over its heads."""
    sizes = []
    for site, conditions in zip(bench.anystory.model.sites, run.conditions, strict=True):
        tokens = (latent // site.stride) ** 2
        references = sum(conditions.reference.lengths)
        sizes.append(site.heads * tokens * (tokens + references) * width)
    return max(sizes)
