#!/usr/bin/env bash
# torch 2.14.1: torch.optim.Muon makes its steps orthogonal in bfloat16, whatever the type of the
# parameters, float64 included, and on every device; no argument says otherwise. A processor without
# instructions for bfloat16 is then slower by far than in float32, while the same model's forward and
# backward pass, which are in float32, are not.
#
# Seen: every product of a step of float32 and of float64 matrices is one of bfloat16. The same
# iteration in float32, 16 matrices of 256x1024: on an EPYC with AVX2 alone 0.03 of the time that it
# takes in bfloat16; the ratio is the processor's, and only printed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1
cat > "$folder/look.py" <<'PY'
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    """The types that matrices are multiplied in."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.types.add(made.dtype)
        return made


def parameters(dtype, count=2):
    made = [torch.nn.Parameter(torch.randn(256, 1024, dtype=dtype)) for _ in range(count)]
    for one in made:
        one.grad = torch.randn_like(one)
    return made


def seconds(dtype):
    xs = [torch.randn(256, 1024).to(dtype) for _ in range(16)]
    start = time.process_time()
    for x in xs:
        for _ in range(5):
            square = x @ x.T
            x = torch.addmm(x, square, x)
    return time.process_time() - start


print("torch", torch.__version__)
for dtype in (torch.float32, torch.float64):
    with Products() as seen:
        torch.optim.Muon(parameters(dtype)).step()
    print(f"parameters of {dtype} are multiplied in {sorted(map(str, seen.types))}")
    assert seen.types == {torch.bfloat16}
torch.set_num_threads(1)
print(f"float32 takes {seconds(torch.float32) / seconds(torch.bfloat16):.2f} of the time of bfloat16 here")
PY
"$folder/venv/bin/python" "$folder/look.py"
