"""torch.compile for the networks of a run: the blocks that many sites share, each compiled once a
shape.

A whole U-Net cannot be one graph: at every site it leaves for the subjects' attention, whose number
of the site would be part of each graph. What lies between has no such number: convolutions with
their norms, and feed-forward layers. All of one shape share a graph.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .libraries import library

# diffusers' and our own.
_BLOCKS = ("ResnetBlock2D", "ResBlock", "FeedForward")
_MOST_SHAPES = 64  # of one kind of block: SDXL's convolutions have 12, twice for validation


def compile_blocks(*networks: nn.Module, backend: Any = "inductor") -> int:
    """Compile the blocks inside of networks when they are first called; how many there are. Those
    whose weights are gathered for each call stay as they are."""
    config = library("torch._dynamo").config
    config.recompile_limit = max(config.recompile_limit, _MOST_SHAPES)
    found = 0
    for network in networks:
        for module in network.modules():
            if type(module).__name__ in _BLOCKS and not isinstance(module, FSDPModule):
                cast(Any, module).compile(backend=backend)
                found += 1
    return found
