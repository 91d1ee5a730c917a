"""The router's stream and the routing map of every block.

Nine tokens of each picture run beside the text through every block, with low-rank branches of
their own, and look at image and router tokens alone. In every block, before they move on, they say
which subject an image token belongs to, for this very block:

    q = norm_q(W_q r + D_q(r));  k = rope(norm_k(W_k z + D_k(z)))      r, z: modulated states
    q_i = mean of q over heads and the tokens of subject i;  k_u = mean of k over heads
    route(u) = argmax_i <q_i, k_u>

W_q, W_k are the block's own layers without the stream's branches. There is no background candidate.
The means and the products are computed in float32: in half precision close calls are rounding.

Axes: B rows, A rows that are routed, N subjects, P router tokens, M image tokens, h width of a
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .host import Flux, rotate
from .low_rank import RoutingMaps, StreamBranches


@dataclass(frozen=True)
class Router:
    """What a run's learned routing needs: the modules, and the router tokens of N subjects.

    tokens (1,P,C): those of all pictures, subject by subject; lengths: how many each subject has.
    """

    branches: StreamBranches
    maps: RoutingMaps
    tokens: Tensor
    lengths: tuple[int, ...]

    def enter(self, net: Flux, batch: int, like: Tensor) -> Tensor:
        """The stream before the first block: (batch,P,d)."""
        tokens = self.tokens.to(like)
        entered = self.branches.input.add(net.txt_in(tokens), tokens)
        return entered.expand(batch, -1, -1)


def subject_queries(q: Tensor, lengths: Sequence[int]) -> Tensor:
    """q (A,H,P,h): normalised queries of the router tokens -> each subject's mean query (A,N,h) in
    float32."""
    tokens = q.float().mean(dim=1)  # (A,P,h)
    return torch.stack(
        [part.mean(dim=1) for part in torch.split(tokens, list(lengths), dim=1)], dim=1
    )


def image_keys(k: Tensor, positions: Tensor) -> Tensor:
    """k (A,H,M,h): normalised keys of the image tokens -> their mean keys (A,M,h) in float32. All
    heads turn alike, so the mean comes before the rotation."""
    return rotate(k.float().mean(dim=1, keepdim=True), positions)[:, 0]


def route(queries: Tensor, keys: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """(A,N,h), (A,M,h) -> region ids (A,M) and logits (A,N,M).

    allowed (A or 1,N,M) bool: where subject i may be; a token that none may have gets the id N.
    Equal logits go to the lower number."""
    logits = queries @ keys.transpose(1, 2)
    if allowed is None:
        return logits.argmax(dim=1), logits
    logits = logits.masked_fill(~allowed, -torch.inf)
    ids = torch.where(allowed.any(dim=1), logits.argmax(dim=1), queries.shape[1])
    return ids, logits
