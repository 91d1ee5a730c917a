"""Low-rank branches beside the transformer's own layers.

A stream s of tokens goes through the layer f as ``f(x) + D(x)``, ``D(x) = B(Ax) + b``; all other
streams go through f alone. The branch is added to the layer's output and never written into its
weights: it is exact beside 8-bit or quantised weights, and a user's LoRA on the layer acts on every
stream. Scales (alpha / rank) are part of B and b in a file.

Axes: B rows, X tokens, d width of the transformer, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import FluxConfig
from .sites import build_sites


class Branch(nn.Module):
    """The branches of one layer, or of the consecutive output slices of a fused one: a single A
    with the ranks of all slices stacked, and a B for each slice."""

    def __init__(
        self,
        inputs: int,
        outputs: Sequence[int],
        *,
        rank: int,
        bias: bool,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        kw: dict[str, Any] = {"dtype": dtype, "device": device}
        self.outputs = tuple(outputs)
        self.down = operations.Linear(inputs, rank * len(self.outputs), bias=False, **kw)
        self.up = nn.ModuleList(
            [operations.Linear(rank, width, bias=bias, **kw) for width in self.outputs]
        )

    def forward(self, x: Tensor) -> Tensor:
        """D(x): (B,X,inputs) -> (B,X,sum of outputs)."""
        pieces = [up(low) for up, low in self._lows(x)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """D(x) added to ``out`` (B,X,sum of outputs), the layer's own output of x, in place."""
        start = 0
        for width, (up, low) in zip(self.outputs, self._lows(x), strict=True):
            out[..., start : start + width] += up(low)
            start += width
        return out

    def _lows(self, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
        return list(zip(self.up, self.down(x).chunk(len(self.outputs), dim=-1), strict=True))


class DoubleBranches(nn.Module):
    """The branches of one stream in a double block; the first feed-forward layer has none."""

    def __init__(self, width: int, mlp_width: int, **kw: Any) -> None:
        super().__init__()
        self.modulation = Branch(width, [6 * width], **kw)
        self.qkv = Branch(width, 3 * [width], **kw)
        self.proj = Branch(width, [width], **kw)
        self.mlp = Branch(mlp_width, [width], **kw)


class SingleBranches(nn.Module):
    """The branches of one stream in a single block: ``linear1`` gives [q, k, v, feed-forward]."""

    def __init__(self, width: int, mlp_width: int, **kw: Any) -> None:
        super().__init__()
        self.modulation = Branch(width, [3 * width], **kw)
        self.linear1 = Branch(width, [*(3 * [width]), mlp_width], **kw)
        self.linear2 = Branch(width + mlp_width, [width], **kw)


class StreamBranches(nn.Module):
    """All branches of one stream: of its input layer and of every block."""

    def __init__(self, config: FluxConfig, inputs: int, **kw: Any) -> None:
        super().__init__()
        sizes = config.transformer
        self.input = Branch(inputs, [sizes.width], **kw)
        self.double_blocks = nn.ModuleList(
            [DoubleBranches(sizes.width, sizes.mlp_width, **kw) for _ in range(sizes.double_blocks)]
        )
        self.single_blocks = nn.ModuleList(
            [SingleBranches(sizes.width, sizes.mlp_width, **kw) for _ in range(sizes.single_blocks)]
        )

    @classmethod
    def reference(cls, config: FluxConfig, **kw: Any) -> StreamBranches:
        """Those of the reference stream, beside the image side; kw: operations, dtype, device."""
        ranks = config.branches
        kw |= {"rank": ranks.reference_rank, "bias": ranks.reference_bias}
        return cls(config, config.transformer.token_width, **kw)

    @classmethod
    def router(cls, config: FluxConfig, **kw: Any) -> StreamBranches:
        """Those of the router's stream, beside the text side."""
        ranks = config.branches
        kw |= {"rank": ranks.router_rank, "bias": ranks.router_bias}
        return cls(config, config.transformer.context_dim, **kw)

    def double_at(self, number: int) -> DoubleBranches:
        """The branches of a double block."""
        return cast(DoubleBranches, self.double_blocks[number])

    def single_at(self, number: int) -> SingleBranches:
        """The branches of a single block."""
        return cast(SingleBranches, self.single_blocks[number])


class RoutingMap(nn.Module):
    """The branches of one block's routing map, beside the query and the key layer."""

    def __init__(self, width: int, **kw: Any) -> None:
        super().__init__()
        self.query = Branch(width, [width], **kw)
        self.key = Branch(width, [width], **kw)


class RoutingMaps(nn.Module):
    """One :class:`RoutingMap` for each block, under the site's number."""

    def __init__(self, config: FluxConfig, **kw: Any) -> None:
        super().__init__()
        kw |= {"rank": config.branches.routing_map_rank, "bias": True}
        for site in build_sites(config.transformer):
            self.add_module(str(site.index), RoutingMap(site.channels, **kw))

    def at(self, index: int) -> RoutingMap:
        """The branches of block ``index``."""
        return cast(RoutingMap, self.get_submodule(str(index)))
