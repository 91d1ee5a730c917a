"""Redux embedder: vision states of a picture -> tokens of its subject.

FLUX.1-Redux's two layers with low-rank branches, then a gated mean over the cells of a coarse grid:

    u = W_up E + D_up(E);   z = W_dn silu(u) + D_dn(silu(u));   g = sigmoid(w z + b)
    X = pool(g z) / (pool(g) + 1e-6) * [pool(m) > 0]

Cells that the mask does not touch stay as zero tokens. One embedder makes the tokens of the text
stream (9x9), a second one those of the router's (3x3).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import FluxConfig
from .low_rank import Branch


class ReduxEmbedder(nn.Module):
    """``grid`` squared tokens from the states of one picture."""

    def __init__(
        self,
        config: FluxConfig,
        *,
        grid: int,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        kw: dict[str, Any] = {"dtype": dtype, "device": device}
        inputs, outputs = config.vision.width, config.transformer.context_dim
        hidden = outputs * config.redux.hidden_ratio
        branch: dict[str, Any] = {"rank": config.redux.rank, "bias": True, "operations": operations}
        self.grid = grid
        self.redux_up = operations.Linear(inputs, hidden, **kw)
        self.redux_down = operations.Linear(hidden, outputs, **kw)
        self.up_branch = Branch(inputs, [hidden], **branch, **kw)
        self.down_branch = Branch(hidden, [outputs], **branch, **kw)
        self.gate = operations.Linear(outputs, 1, **kw)

    def forward(self, states: Tensor, inside: Tensor) -> Tensor:
        """states (V,s*s,W): the vision encoder's last ones, after its norm; inside (V,s*s) in
        {0,1}: patches that the mask touches -> (V,grid*grid,C)."""
        hidden = nn.functional.silu(self.up_branch.add(self.redux_up(states), states))
        z = self.down_branch.add(self.redux_down(hidden), hidden)
        gate = self.gate(z).sigmoid()  # (V,s*s,1)
        mean = self._pool(z * gate) / (self._pool(gate) + 1e-6)
        touched = self._pool(inside[..., None].to(z)) > 0
        return mean * touched

    def _pool(self, x: Tensor) -> Tensor:
        """(V,s*s,C) -> (V,grid*grid,C), each cell the mean of the patches that it touches."""
        side = math.isqrt(x.shape[1])
        image = x.transpose(1, 2).reshape(x.shape[0], -1, side, side)
        pooled = nn.functional.adaptive_avg_pool2d(image, self.grid)
        return pooled.flatten(2).transpose(1, 2)
