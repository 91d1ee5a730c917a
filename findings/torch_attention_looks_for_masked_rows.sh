#!/usr/bin/env bash
# torch 2.14.1: scaled_dot_product_attention by the MATH backend, which a model that trains on a CPU
# takes where the fused kernel's backward pass is slow, looks for rows that are masked out altogether
# (isneginf, all and where over every score) also where there is no mask and no row can be. Written
# as two products and a softmax the same attention does without: a training step of a small U-Net
# took 0.87 of the time.
#
# Seen: the operators isneginf, all and where under _safe_softmax in a call without a mask; none of
# them in softmax(q k^T) v, which gives the same numbers. Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

LOOKING = {"aten::isneginf", "aten::all", "aten::where"}
x = torch.randn(1, 4, 64, 32, requires_grad=True)


def operators(function):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        out = function()
    return out, LOOKING & {event.name for event in profiler.events()}


def by_math():
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(x, x, x)


def by_hand():
    return (x @ x.transpose(-1, -2) * x.shape[-1] ** -0.5).softmax(dim=-1) @ x


(one, looked), (other, plain) = operators(by_math), operators(by_hand)
print("torch", torch.__version__, "MATH without a mask:", sorted(looked), "; by hand:", sorted(plain))
assert looked == LOOKING and not plain
assert torch.allclose(one, other, atol=1e-5)
PY
