"""The decoupled instance-aware router of one block (paper 3.3, Fig. 6).

    coarse  = <W1 R_i, W2 Z_u> / sqrt(d_k)          M_coarse = softmax over i
    R'_i    = R_i + W_o Attn(q = Wq norm(R_i), k = Wk Z, v = Wv Z; tokens with argmax M_coarse = i)
    refined = <W3 R'_i, W4 Z_u> / sqrt(d_k)         M = softmax over i

A candidate whose coarse region is empty attends to every token. All maps of Z are linear and R has
few rows, so nothing of size hw x d_k is built: W2, Wk and W4 are stored transposed (``Linear(d_k ->
d)``) and applied on the R side, and Wv is applied after the sum over tokens. That is exact. What is
left of a router for a sampling run are its :class:`RouterKeys`; its weights are not asked again.

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
class RoutingLogits:
    """Scores before the softmax over candidates, float32; ``allowed`` already applied."""

    coarse: Tensor  # (B,C,Q)
    refined: Tensor  # (B,C,Q); the coarse ones themselves when the router does not refine


@dataclass(frozen=True)
class Refinement:
    """What a router asks of the tokens of each coarse region."""

    refined: Tensor  # (R,C,D): W4^T W3 R_i / sqrt(d_k)
    value: Tensor  # (D,K): Wv, transposed
    update: Tensor  # (K,D): W4^T W3 W_o / sqrt(d_k), what attention adds to ``refined``
    own: Tensor  # (H,1,K): 1 on the values of each head
    numbers: Tensor  # (C,1): 0 to C - 1


@dataclass(frozen=True)
class RouterKeys:
    """A router and the routing features that it was asked with, folded together; constant over a
    sampling run."""

    candidates: int
    # (R,(1+H)*C,D), R = 1 or B: the candidates' coarse keys, then their queries, head by head;
    # without refinement the coarse keys alone.
    scores: Tensor
    refinement: Refinement | None = None

    def logits(self, z: Tensor, allowed: Tensor | None = None) -> RoutingLogits:
        """Scores of every candidate at every token.

        z (B,Q,D): the block's ``norm2`` output. allowed (B or 1, C, Q) bool: candidates forbidden
        at a token score -inf; each token must keep at least one.
        """
        rows, tokens, _ = z.shape
        across = z.transpose(1, 2)
        scores = _wide(torch.matmul(_as(self.scores, z), across))  # (B,(1+H)*C,Q)
        if self.refinement is None:
            coarse = _forbid(scores, allowed)
            return RoutingLogits(coarse, coarse)
        scores = scores.view(rows, -1, self.candidates, tokens)  # (B,1+H,C,Q)
        coarse = _forbid(scores[:, 0], allowed)
        # A region's other tokens are closed to its candidate, unless it has none.
        outside = coarse.argmax(dim=1, keepdim=True) != self.refinement.numbers
        outside = outside > outside.all(dim=-1, keepdim=True)  # (B,C,Q)
        attention = scores[:, 1:].masked_fill(outside.unsqueeze(1), -torch.inf).softmax(dim=-1)
        summed = torch.matmul(_as(attention.flatten(1, 2), z), z)  # (B,H*C,D): sum_u a_u Z_u
        key = self._refined(summed)  # (B,C,D)
        return RoutingLogits(coarse, _forbid(_wide(torch.matmul(key, across)), allowed))

    def _refined(self, summed: Tensor) -> Tensor:
        """W4^T W3 R'_i / sqrt(d_k), from what each head found: (B,H*C,D) -> (B,C,D)."""
        assert self.refinement is not None
        values = torch.matmul(summed, _as(self.refinement.value, summed))  # (B,H*C,K)
        values = values.view(len(summed), -1, self.candidates, values.shape[-1])
        own = (values * _as(self.refinement.own, summed)).sum(dim=1)  # each head keeps its slice
        update = torch.matmul(own, _as(self.refinement.update, summed))
        return update + _as(self.refinement.refined, summed)


def _as(x: Tensor, like: Tensor) -> Tensor:
    """In the number type and on the device of ``like``; without a call where it is so already."""
    return x if x.dtype == like.dtype and x.device == like.device else x.to(like)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else x.float()


def _forbid(logits: Tensor, allowed: Tensor | None) -> Tensor:
    return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)


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
        self.width = width
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

        def unit(size: int) -> Tensor:
            return torch.eye(size, dtype=routing.dtype, device=routing.device)

        own = unit(self.heads).repeat_interleave(self.key_dim // self.heads, dim=1)
        own = own[:, None]  # (H,1,K)
        # One row per head, zero outside that head's slice: the transposed key map then acts on each
        # head alone although it is one ordinary Linear.
        spread = self.query(self.norm(routing))[:, None] * own  # (R,H,C,K)
        queries = self.key(spread) / (self.key_dim / self.heads) ** 0.5  # (R,H,C,D)
        # R'_i is linear in what attention finds, and so is its key: three maps become one.
        both = torch.cat((routing.flatten(0, 1), self.out(unit(self.key_dim)).to(routing)))
        both = self.refine_z(self.refine_r(both)) / self.key_dim**0.5
        refined, update = both.split((len(both) - self.key_dim, self.key_dim))
        return RouterKeys(
            candidates,
            torch.cat((coarse, queries.flatten(1, 2)), dim=1),
            Refinement(
                refined.unflatten(0, (-1, candidates)),
                self.value(unit(self.width)).to(routing),
                update,
                own,
                torch.arange(candidates, device=routing.device)[:, None],
            ),
        )


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
