"""QFormer (paper Eq. 2): CLIP states of a picture -> a fixed number of tokens.

A Perceiver resampler with the parameter names and shapes of IP-Adapter Plus' ``image_proj``, so its
public weights load. Axes: V pictures, S CLIP states, T learned queries, C output width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import QFormerConfig


class PerceiverAttention(nn.Module):
    """The queries attend to the picture's states and to themselves."""

    def __init__(
        self, *, width: int, heads: int, head_dim: int, operations: Any, dtype: Any, device: Any
    ) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_dim
        kw: dict[str, Any] = {"dtype": dtype, "device": device}
        self.norm1 = operations.LayerNorm(width, **kw)
        self.norm2 = operations.LayerNorm(width, **kw)
        self.to_q = operations.Linear(width, inner, bias=False, **kw)
        self.to_kv = operations.Linear(width, 2 * inner, bias=False, **kw)
        self.to_out = operations.Linear(inner, width, bias=False, **kw)

    def forward(self, states: Tensor, latents: Tensor) -> Tensor:
        """states (V,S,W), latents (V,T,W) -> (V,T,W)."""
        states, latents = self.norm1(states), self.norm2(latents)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat((states, latents), dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)  # (V,H,T,head_dim)
        return self.to_out(out.transpose(1, 2).flatten(2))


def feed_forward(width: int, mult: int, operations: Any, dtype: Any, device: Any) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear; the index of each is part of the public weights' names."""
    kw: dict[str, Any] = {"dtype": dtype, "device": device}
    return nn.Sequential(
        operations.LayerNorm(width, **kw),
        operations.Linear(width, mult * width, bias=False, **kw),
        nn.GELU(),
        operations.Linear(mult * width, width, bias=False, **kw),
    )


class QFormer(nn.Module):
    """``config.queries`` learned queries resample the CLIP states to (T, output_dim)."""

    def __init__(
        self,
        config: QFormerConfig,
        *,
        input_dim: int,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        kw: dict[str, Any] = {"dtype": dtype, "device": device}
        width = config.width
        self.latents = nn.Parameter(torch.randn(1, config.queries, width, **kw) / width**0.5)
        self.proj_in = operations.Linear(input_dim, width, **kw)
        self.proj_out = operations.Linear(width, config.output_dim, **kw)
        self.norm_out = operations.LayerNorm(config.output_dim, **kw)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    PerceiverAttention(
                        width=width,
                        heads=config.heads,
                        head_dim=config.head_dim,
                        operations=operations,
                        **kw,
                    ),
                    feed_forward(width, config.ff_mult, operations, **kw),
                )
            )
            for _ in range(config.layers)
        )

    def forward(self, states: Tensor) -> Tensor:
        """CLIP states (V,S,input_dim) -> subject tokens (V,T,output_dim)."""
        return self.resample(states, self.latents)

    def resample(self, states: Tensor, queries: Tensor) -> Tensor:
        """As :meth:`forward`, with other queries (1,T,width)."""
        x = self.proj_in(states)
        latents = queries.to(x).expand(x.shape[0], -1, -1)
        for layer in self.layers:
            attention, feed = layer.children()
            latents = attention(x, latents) + latents
            latents = feed(latents) + latents
        return self.norm_out(self.proj_out(self.finished(latents)))

    def finished(self, latents: Tensor) -> Tensor:
        """What the last layer gives, before the projection: (V,T,width)."""
        return latents
