#!/usr/bin/env bash
# torch 2.14.1: FlopCounterMode counts nothing for scaled_dot_product_attention on the CPU, where it
# runs as one fused operator that the counter has no formula for; the same call by the MATH backend,
# or on the device "meta", is counted. A model whose attention goes there looks cheaper than it is,
# and a change from one attention to the other looks like saved operations. A formula can be given:
# FlopCounterMode(custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: ...}).
#
# Seen: 0 by default, 4 x 8 x 128 x 128 x 64 = 33,554,432 by MATH. Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
HEADS, TOKENS, WIDTH = 8, 128, 64


def count(backend, **given) -> int:
    x = torch.randn(1, HEADS, TOKENS, WIDTH)
    chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
    with torch.no_grad(), chosen, FlopCounterMode(display=False, **given) as counter:
        scaled_dot_product_attention(x, x, x)
    return counter.get_total_flops()


wanted = 4 * HEADS * TOKENS * TOKENS * WIDTH
formula = {FUSED: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
found = count(None), count(SDPBackend.MATH), count(None, custom_mapping=formula)
print("torch", torch.__version__, "by default, by MATH, by default with a formula:", *found)
assert found == (0, wanted, wanted)
PY
