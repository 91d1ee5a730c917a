"""The paper's equations written out in float64, token by token and candidate by candidate.

Nothing here is shared with the code under test, and nothing is fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def softmax(values: Tensor) -> Tensor:
    """Of one vector."""
    shifted = torch.exp(values - values.max())
    return shifted / shifted.sum()


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """One query (D,), keys and values (K,D), bias (K,) -> (D,): Softmax(qK/sqrt(d) + bias) V."""
    q, k, v = q.double(), k.double(), v.double()
    size = q.shape[0] // heads
    out = torch.zeros_like(q)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = k[:, part] @ q[part] / math.sqrt(size)
        if bias is not None:
            logits = logits + bias.double()
        out[part] = softmax(logits) @ v[:, part]
    return out


def equation_5(
    q: Tensor,
    text: Tensor,
    route: Tensor,
    conditions: Sequence[tuple[Tensor, Tensor] | None],
    eta: Sequence[float],
    heads: int,
) -> Tensor:
    """q, text (Q,D), route (Q,): text + eta_i sigma_i * Attn(q, K_i, V_i), summed over i."""
    out = text.double().clone()
    for u in range(q.shape[0]):
        for i, condition in enumerate(conditions):
            sigma = 1.0 if int(route[u]) == i else 0.0
            if condition is not None:
                out[u] += eta[i] * sigma * attend(q[u], *condition, heads)
    return out


def equation_6(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    references: Sequence[tuple[Tensor, Tensor] | None],
    gamma: Sequence[float],
    heads: int,
) -> Tensor:
    """q, k, v (Q,D): one softmax over [K, K_1 ... K_N] with the bias of Eq. 7 and 8."""
    keys, values, owner = [k], [v], [torch.full((k.shape[0],), -1)]
    for i, reference in enumerate(references):
        if reference is not None:
            keys.append(reference[0])
            values.append(reference[1])
            owner.append(torch.full((reference[0].shape[0],), i))
    all_k, all_v, who = torch.cat(keys), torch.cat(values), torch.cat(owner)
    out = torch.zeros(q.shape, dtype=torch.float64)
    for u in range(q.shape[0]):
        bias = torch.zeros(all_k.shape[0], dtype=torch.float64)
        for j in range(all_k.shape[0]):
            i = int(who[j])
            if i >= 0:
                bias[j] = gamma[i] if int(route[u]) == i else -math.inf
        out[u] = attend(q[u], all_k, all_v, heads, bias)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of one vector, eps 1e-5."""
    x = x.double()
    variance = ((x - x.mean()) ** 2).mean()
    return (x - x.mean()) / torch.sqrt(variance + 1e-5) * weight.double() + bias.double()


def router(
    weights: dict[str, Tensor], r: Tensor, z: Tensor, heads: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """DESIGN's router box with every map applied on its own side: r (C,E), z (Q,D) ->
    coarse and refined maps (C,Q)."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    r, z = r.double(), z.double()
    candidates, tokens = r.shape[0], z.shape[0]
    key_dim = w["coarse_r.weight"].shape[0]
    w2, wk, w4 = (
        w[f"{n}_z.weight" if n != "key" else "key.weight"].T for n in ("coarse", "key", "refine")
    )

    def scores(left: Tensor, w_left: Tensor, w_right: Tensor) -> Tensor:
        out = torch.zeros(candidates, tokens, dtype=torch.float64)
        for i in range(candidates):
            for u in range(tokens):
                out[i, u] = (w_left @ left[i]) @ (w_right @ z[u]) / math.sqrt(key_dim)
                if allowed is not None and not bool(allowed[i, u]):
                    out[i, u] = -math.inf
        return out

    coarse = scores(r, w["coarse_r.weight"], w2)
    winner = coarse.argmax(dim=0)
    refined_r = r.clone()
    size = key_dim // heads
    for i in range(candidates):
        inside = [u for u in range(tokens) if int(winner[u]) == i] or list(range(tokens))
        normed = layer_norm(r[i], w["norm.weight"], w["norm.bias"])
        q = w["query.weight"] @ normed
        k = torch.stack([wk @ z[u] for u in inside])
        v = torch.stack([w["value.weight"] @ z[u] for u in inside])
        out = torch.zeros(key_dim, dtype=torch.float64)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            out[part] = softmax(k[:, part] @ q[part] / math.sqrt(size)) @ v[:, part]
        refined_r[i] += w["out.weight"] @ out
    refined = scores(refined_r, w["refine_r.weight"], w4)
    return coarse.softmax(dim=0), refined.softmax(dim=0)


def resize(maps: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """maps (C,h*w) on grid ``old`` -> on ``new``: when there are fewer new tokens, the mean over
    what each covers, an old token that it covers in part counting for that part; bilinear between
    centres when there are more."""
    image = maps.double().reshape(-1, *old)
    out = torch.zeros(len(image), *new, dtype=torch.float64)
    for y in range(new[0]):
        for x in range(new[1]):
            if new[0] * new[1] < old[0] * old[1]:
                for row in range(old[0]):
                    for column in range(old[1]):
                        covered = _covered(y, row, old[0], new[0])
                        covered *= _covered(x, column, old[1], new[1])
                        out[:, y, x] += covered * image[:, row, column]
                continue
            for row, down in _between(y, old[0], new[0]):
                for column, across in _between(x, old[1], new[1]):
                    out[:, y, x] += down * across * image[:, row, column]
    return out.flatten(1)


def _covered(i: int, j: int, old: int, new: int) -> float:
    """Share of new place i that old place j lies on."""
    return max(0.0, min((i + 1) / new, (j + 1) / old) - max(i / new, j / old)) * new


def _between(i: int, old: int, new: int) -> list[tuple[int, float]]:
    """The two old places that the centre of new place i lies between, and their weights."""
    centre = max((i + 0.5) * old / new - 0.5, 0.0)
    low = min(int(centre), old - 1)
    return [(low, 1 - (centre - low)), (min(low + 1, old - 1), centre - low)]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    """The attention function that the core is given, in plain torch, any dtype."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits + mask[:, None]
    return (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
