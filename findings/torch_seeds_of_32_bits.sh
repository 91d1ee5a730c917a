#!/usr/bin/env bash
# torch 2.14.1: a generator on the CPU takes any 64-bit seed, and initial_seed() gives it back, but
# only its lower 32 bits decide the numbers. Seeds that are made as `base + number * 2**32`, or that
# hash a name to 64 bits, repeat one another on the CPU; NumPy's generators use all bits.
#
# Seen: the seeds 1, 1 + 2**32 and 1 + 2**63 give the same numbers, 1 + 2**31 others. Fails when that
# changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import numpy
import torch


def numbers(seed: int) -> list[float]:
    return torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()


for more in (0, 2**31, 2**32, 2**63):
    print("torch", torch.__version__, f"seed 1 + {more}:", [round(x, 4) for x in numbers(1 + more)])
generator = torch.Generator().manual_seed(1 + 2**32)
print("initial_seed() of the third:", generator.initial_seed())
assert numbers(1) == numbers(1 + 2**32) == numbers(1 + 2**63) != numbers(1 + 2**31)
assert generator.initial_seed() == 1 + 2**32
one, other = (numpy.random.default_rng(seed).random() for seed in (1, 1 + 2**32))
print("NumPy's default_rng:", round(one, 4), round(other, 4))
assert one != other
PY
