"""Tensors of which each process may hold a part, as PyTorch's FSDP2 leaves them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed import tensor as distributed_tensor

from .ranks import Ranks


def whole(x: Tensor) -> Tensor:
    """The whole of a tensor, detached; all processes call it together."""
    if isinstance(x, distributed_tensor.DTensor):
        return cast(Any, x.detach()).full_tensor()
    return x.detach()


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
        full = distributed_tensor.distribute_tensor(full, mesh, placements)
    target.copy_(full)
