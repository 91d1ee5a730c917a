"""Trained weights of which each process holds a part: PyTorch's FSDP2.

A module's weights are gathered when it is called and given back after it, forward and backward. So
each module here is one that is called as a whole: the ReferenceNet's blocks, the QFormer, and the K
and V maps of each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed import tensor as distributed_tensor

from ..bases.sdxl.reference_net import ReferenceNet
from ..bases.sdxl.unet_blocks import ResBlock, TransformerBlock
from ..injection.keys import KeyValue
from ..injection.projections import Projection
from ..subject.qformer import QFormer
from .libraries import library
from .ranks import Ranks

# What is gathered at once. The ReferenceNet's own call gathers what lies between its blocks.
_GATHERED = (ResBlock, TransformerBlock, ReferenceNet, QFormer, Projection)
# Calls other than a module's forward.
_CALLS: dict[type[nn.Module], tuple[str, ...]] = {Projection: ("gate_row",)}


def shard(stage: nn.Module, *entries: str) -> None:
    """Leave each process its part of a stage's weights. ``entries``: methods of the stage that are
    called from outside, beside its forward."""
    _register(KeyValue)  # gradients are watched for inside of it
    for module in _inner_first(stage):
        if any(True for _ in module.parameters()):
            calls = _CALLS.get(type(module), ())  # of its class, which FSDP2 then changes
            fsdp.fully_shard(module, reshard_after_forward=True)
            for name in calls:
                fsdp.register_fsdp_forward_method(module, name)
    fsdp.fully_shard(stage, reshard_after_forward=True)
    for name in entries:
        fsdp.register_fsdp_forward_method(stage, name)


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _inner_first(child)
        if isinstance(child, _GATHERED):
            yield child


_registered: set[type] = set()


def _register(kind: type) -> None:
    if kind not in _registered:
        library("torch.export").register_dataclass(kind)
        _registered.add(kind)


def local(x: Tensor) -> Tensor:
    """What of a tensor this process holds."""
    return cast(Any, x).to_local() if isinstance(x, distributed_tensor.DTensor) else x


def whole(x: Tensor) -> Tensor:
    """The whole of a tensor, detached; all processes call it together."""
    if isinstance(x, distributed_tensor.DTensor):
        return cast(Any, x.detach()).full_tensor()
    return x.detach()


@torch.no_grad()
def put(target: Any, source: Tensor | None, ranks: Ranks) -> Any:
    """The main process's ``source``, a whole tensor, in all processes' ``target``, or in its place
    where it is of another shape or no tensor."""
    same = isinstance(target, Tensor) and (source is None or target.shape == source.shape)
    if not ranks.broadcast(same):
        value = cast(Tensor, ranks.broadcast(None if source is None else source.cpu()))
        return value.to(ranks.device) if value.ndim else value
    fill(target, source, ranks)
    return target


@torch.no_grad()
def fill(target: Tensor, source: Tensor | None, ranks: Ranks) -> None:
    """Copy the main process's ``source``, a whole tensor, into all processes' ``target``."""
    if ranks.count == 1:
        assert source is not None
        target.copy_(source)
        return
    full = torch.empty(target.shape, dtype=target.dtype, device=ranks.device)
    if source is not None:
        full.copy_(source)
    distributed.broadcast(full, 0)
    if isinstance(target, distributed_tensor.DTensor):
        mesh, placements = target.device_mesh, target.placements
        full = local(distributed_tensor.distribute_tensor(full, mesh, placements))
    local(target).copy_(full)
