"""The training host's dense attention against the equation, with gradients and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from anystory_core.training.hosts.unet import attention_kernels, dense_attention

HEADS, WIDE = 4, 32
CPU = torch.device("cpu")


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head; zeros for queries that see no key."""
    out: list[Tensor] = []
    for qh, kh, vh in zip(*(x.split(WIDE // HEADS, dim=-1) for x in (q, k, v)), strict=True):
        scores = qh @ kh.transpose(1, 2) / (WIDE // HEADS) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        out.append(scores.softmax(dim=-1).nan_to_num() @ vh)
    return torch.cat(out, dim=-1)


def given(grad: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = (13, 21, 21)  # queries, keys, values
    return [torch.randn(3, n, WIDE, generator=g).requires_grad_(grad) for n in sizes]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["no mask", "seen", "added"])
def test_it_is_the_equation(grad: bool, kind: str) -> None:
    """Also for queries that see no key, and for masks of one row that serve all."""
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(3, 13, 21, generator=g) < 0.7 if kind != "no mask" else None
    if mask is not None:
        mask[1, 4:6] = False
        mask = mask[1:2] if kind == "added" else mask
    inputs = given(grad)
    exact = [x.detach().double().requires_grad_(grad) for x in inputs]
    added = mask if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    with attention_kernels(CPU):
        shown = added if kind == "added" else mask
        found = dense_attention(inputs[0], inputs[1], inputs[2], HEADS, shown)
    wanted = naive(exact[0], exact[1], exact[2], mask)
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    if grad:
        found.square().sum().backward()
        wanted.square().sum().backward()
        for ours, theirs in zip(inputs, exact, strict=True):
            assert ours.grad is not None and theirs.grad is not None
            assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_half_precision_stays_half_and_near(masked: bool) -> None:
    inputs = given(True)
    mask = torch.rand(3, 13, 21, generator=torch.Generator().manual_seed(1)) < 0.7
    with torch.autocast("cpu", torch.bfloat16), attention_kernels(CPU):
        # what linear layers give there
        q, k, v = (x.bfloat16() for x in inputs)
        found = dense_attention(q, k, v, HEADS, mask if masked else None)
    assert found.dtype == torch.bfloat16
    exact = naive(inputs[0], inputs[1], inputs[2], mask if masked else None)
    assert (found.float() - exact).abs().max() < 0.03  # bfloat16 has 8 bits
