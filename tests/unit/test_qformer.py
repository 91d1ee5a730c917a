"""QFormer (Eq. 2): public names and shapes, and a transcription in float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import layer_norm, softmax
from torch import Tensor

from anystory_core.config import QFormerConfig
from anystory_core.subject.qformer import QFormer


def test_public_names_and_shapes() -> None:
    """IP-Adapter Plus for SDXL: 16 queries, ViT-H/14 in, 2048 out."""
    former = QFormer(QFormerConfig(queries=16), input_dim=1280, device="meta")
    shapes = {name: tuple(t.shape) for name, t in former.state_dict().items()}
    expected = {
        "latents": (1, 16, 1280),
        "proj_in.weight": (1280, 1280),
        "proj_in.bias": (1280,),
        "proj_out.weight": (2048, 1280),
        "proj_out.bias": (2048,),
        "norm_out.weight": (2048,),
        "norm_out.bias": (2048,),
    }
    for i in range(4):
        expected |= {
            f"layers.{i}.0.norm1.weight": (1280,),
            f"layers.{i}.0.norm1.bias": (1280,),
            f"layers.{i}.0.norm2.weight": (1280,),
            f"layers.{i}.0.norm2.bias": (1280,),
            f"layers.{i}.0.to_q.weight": (1280, 1280),
            f"layers.{i}.0.to_kv.weight": (2560, 1280),
            f"layers.{i}.0.to_out.weight": (1280, 1280),
            f"layers.{i}.1.0.weight": (1280,),
            f"layers.{i}.1.0.bias": (1280,),
            f"layers.{i}.1.1.weight": (5120, 1280),
            f"layers.{i}.1.3.weight": (1280, 5120),
        }
    assert shapes == expected


def transcription(w: dict[str, Tensor], states: Tensor, heads: int, layers: int) -> Tensor:
    """states (S,W) -> (T,C), one query at a time."""
    x = states @ w["proj_in.weight"].T + w["proj_in.bias"]
    queries = w["latents"][0].clone()
    for i in range(layers):
        a, f = f"layers.{i}.0.", f"layers.{i}.1."
        left = torch.stack([layer_norm(s, w[a + "norm1.weight"], w[a + "norm1.bias"]) for s in x])
        own = torch.stack(
            [layer_norm(q, w[a + "norm2.weight"], w[a + "norm2.bias"]) for q in queries]
        )
        pairs = torch.cat((left, own)) @ w[a + "to_kv.weight"].T
        keys, values = pairs.chunk(2, dim=-1)
        out = torch.zeros_like(keys[: len(queries)])
        size = keys.shape[1] // heads
        for t, q in enumerate(own @ w[a + "to_q.weight"].T):
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                weights = softmax(keys[:, part] @ q[part] / math.sqrt(size))
                out[t, part] = weights @ values[:, part]
        queries = queries + out @ w[a + "to_out.weight"].T
        for t in range(len(queries)):
            y = layer_norm(queries[t], w[f + "0.weight"], w[f + "0.bias"]) @ w[f + "1.weight"].T
            gelu = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
            queries[t] = queries[t] + gelu @ w[f + "3.weight"].T
    out = queries @ w["proj_out.weight"].T + w["proj_out.bias"]
    return torch.stack([layer_norm(q, w["norm_out.weight"], w["norm_out.bias"]) for q in out])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 3),
    states=st.integers(1, 9),
    inputs=st.integers(1, 9),
    queries=st.integers(1, 4),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    output=st.integers(2, 7),
)
@torch.no_grad()
def test_equals_the_transcription(
    seed: int,
    rows: int,
    states: int,
    inputs: int,
    queries: int,
    layers: int,
    heads: int,
    head_dim: int,
    output: int,
) -> None:
    torch.manual_seed(seed)
    config = QFormerConfig(
        queries=queries,
        width=12,
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        output_dim=output,
    )
    former = QFormer(config, input_dim=inputs, dtype=torch.float64)
    for parameter in former.parameters():
        parameter.copy_(torch.randn_like(parameter))
    given_states = torch.randn(rows, states, inputs, dtype=torch.float64)
    got = former(given_states)
    assert got.shape == (rows, queries, output)
    for row in range(rows):
        wanted = transcription(dict(former.state_dict()), given_states[row], heads, layers)
        # float64 sums in another order; a norm over few numbers amplifies them
        assert torch.allclose(got[row], wanted, atol=1e-8)
