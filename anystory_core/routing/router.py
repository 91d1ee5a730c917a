"""The decoupled instance-aware router of one block (paper 3.3, Fig. 6).

    coarse  = <W1 R_i, W2 Z_u> / sqrt(d_k)          M_coarse = softmax over i
    R'_i    = R_i + W_o Attn(q = Wq norm(R_i), k = Wk Z, v = Wv Z; tokens with argmax M_coarse = i)
    refined = <W3 R'_i, W4 Z_u> / sqrt(d_k)         M = softmax over i

A candidate whose coarse region is empty attends to every token. All maps of Z are linear and R has
few rows, so nothing of size hw x d_k is built: W2, Wk and W4 are stored transposed (``Linear(d_k ->
d)``) and applied on the R side, and Wv is applied after the sum over tokens. That is exact.

Axes: B rows, C candidates (N subjects, then the background), Q image tokens, D block width,
E routing width d_r, K key width d_k, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..bases.base import Site
from ..config import RouterConfig


@dataclass(frozen=True)
class RouterKeys:
    """What a router needs of the routing features; constant over a sampling run."""

    candidates: int
    scores: Tensor  # (R,C*(1+H),D), R = 1 or B: each candidate's coarse key, then its H queries
    refined: Tensor | None = None  # (R,C,D): W4^T W3 R_i / sqrt(d_k)
    update: Tensor | None = None  # (K,D): W4^T W3 W_o / sqrt(d_k), what attention adds to it


@dataclass(frozen=True)
class RoutingLogits:
    """Scores before the softmax over candidates, float32; ``allowed`` already applied."""

    coarse: Tensor  # (B,C,Q)
    refined: Tensor  # (B,C,Q); the coarse ones themselves when the router does not refine


class Router(nn.Module):
    """Routing features and hidden states -> routing maps, for one block."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        width: int,
        routing_dim: int,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.heads = config.heads
        self.key_dim = config.key_dim
        self.refine = config.refine

        def linear(inputs: int, outputs: int) -> nn.Module:
            return operations.Linear(inputs, outputs, bias=False, dtype=dtype, device=device)

        self.coarse_r = linear(routing_dim, config.key_dim)  # W1
        self.coarse_z = linear(config.key_dim, width)  # W2, transposed
        if not config.refine:
            return
        self.norm = operations.LayerNorm(routing_dim, dtype=dtype, device=device)
        self.query = linear(routing_dim, config.key_dim)  # Wq
        self.key = linear(config.key_dim, width)  # Wk, transposed
        self.value = linear(width, config.key_dim)  # Wv
        self.out = linear(config.key_dim, routing_dim)  # W_o
        self.refine_r = linear(routing_dim, config.key_dim)  # W3
        self.refine_z = linear(config.key_dim, width)  # W4, transposed

    def prepare(self, routing: Tensor) -> RouterKeys:
        """Fold the routing features (R,C,E) into keys on the hidden states' side."""
        candidates = routing.shape[1]
        coarse = self.coarse_z(self.coarse_r(routing)) / self.key_dim**0.5  # (R,C,D)
        if not self.refine:
            return RouterKeys(candidates, coarse)
        query = self.query(self.norm(routing)).unflatten(-1, (self.heads, -1))  # (R,C,H,K/H)
        # One row per head, zero outside that head's slice: the transposed key map then acts on each
        # head alone although it is one ordinary Linear.
        spread = torch.diag_embed(query.transpose(-1, -2), dim1=-3, dim2=-2)  # (R,C,H,H,K/H)
        queries = self.key(spread.flatten(-2)) / (self.key_dim / self.heads) ** 0.5  # (R,C,H,D)
        # R'_i is linear in what attention finds, and so is its key: three maps become one.
        unit = torch.eye(self.key_dim, dtype=routing.dtype, device=routing.device)
        both = torch.cat((routing.flatten(0, 1), self.out(unit).to(routing)))
        both = self.refine_z(self.refine_r(both)) / self.key_dim**0.5
        refined, update = both.split((len(both) - self.key_dim, self.key_dim))
        return RouterKeys(
            candidates,
            torch.cat((coarse, queries.flatten(1, 2)), dim=1),
            refined.unflatten(0, (-1, candidates)),
            update,
        )

    def logits(self, z: Tensor, keys: RouterKeys, allowed: Tensor | None = None) -> RoutingLogits:
        """Scores of every candidate at every token.

        z (B,Q,D): the block's ``norm2`` output. allowed (B or 1, C, Q) bool: candidates forbidden
        at a token score -inf; each token must keep at least one.
        """
        candidates = keys.candidates
        across = z.transpose(1, 2)
        scores = torch.matmul(keys.scores.to(z), across)  # (B,C*(1+H),Q)
        coarse = _forbid(scores[:, :candidates].float(), allowed)
        if keys.refined is None or keys.update is None:
            return RoutingLogits(coarse, coarse)

        with torch.no_grad():  # the mask is hard: no gradient passes through it
            winner = coarse.argmax(dim=1, keepdim=True)  # (B,1,Q)
            inside = torch.zeros_like(coarse, dtype=torch.bool).scatter_(1, winner, True)
            # (B,C,Q); a candidate whose region is empty attends to every token
            outside = ~inside & inside.any(dim=-1, keepdim=True)
        attention = scores[:, candidates:].float()
        attention = attention.reshape(-1, candidates, self.heads, z.shape[1])
        attention = attention.masked_fill(outside[:, :, None], -torch.inf).softmax(dim=-1)
        summed = torch.matmul(attention.flatten(1, 2).to(z), z)  # (B,C*H,D): sum_u a_u Z_u
        value: Tensor = self.value(summed)  # (B,C*H,K)
        # (B,C,H,H,K/H): head h keeps its own slice
        value = value.reshape(-1, candidates, self.heads, self.heads, self.key_dim // self.heads)
        value = value.diagonal(dim1=2, dim2=3).transpose(-1, -2).flatten(2)  # (B,C,K)
        key = keys.refined.to(z) + torch.matmul(value, keys.update.to(z))  # (B,C,D)
        return RoutingLogits(coarse, _forbid(torch.matmul(key, across).float(), allowed))


def _forbid(logits: Tensor, allowed: Tensor | None) -> Tensor:
    return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)


class Routers(nn.Module):
    """One router per site, under the site's number."""

    def __init__(
        self,
        config: RouterConfig,
        sites: Sequence[Site],
        *,
        routing_dim: int,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for site in sites:
            router = Router(
                config,
                width=site.channels,
                routing_dim=routing_dim,
                operations=operations,
                dtype=dtype,
                device=device,
            )
            self.add_module(str(site.index), router)

    def at(self, index: int) -> Router:
        """The router of block ``index``."""
        return cast(Router, self.get_submodule(str(index)))

    def items(self) -> Iterator[tuple[int, Router]]:
        """(block index, router) in forward order."""
        for name, router in self.named_children():
            yield int(name), cast(Router, router)
