#!/usr/bin/env bash
# torch 2.14.1: interpolate(mode="area") is not an average over areas where sizes do not divide. A
# source pixel that a target pixel merely touches counts in full, so windows overlap, and weight that
# should be split is counted twice: the mean of the picture changes.
#
# Seen: [0, 1, 0, 1, 0] at 3 pixels: area 0.5, 0.6667, 0.5 (mean 0.5556); by areas 0.4, 0.4, 0.4, the
# picture's own mean. For masks that are shrunk to a grid of tokens this moves borders.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1
"$folder/venv/bin/python" - <<'PY'
import torch

x = torch.tensor([[[0.0, 1.0, 0.0, 1.0, 0.0]]])
got = torch.nn.functional.interpolate(x, size=3, mode="area")[0, 0]
exact = []
for i in range(3):
    total = 0.0
    for j in range(5):
        shared = max(0.0, min((i + 1) / 3, (j + 1) / 5) - max(i / 3, j / 5))
        total += shared * 3 * float(x[0, 0, j])
    exact.append(total)
print("torch", torch.__version__, "area:", [round(float(v), 4) for v in got])
print("by areas:             ", [round(v, 4) for v in exact])
print("means: picture %.4f, area %.4f, by areas %.4f" % (x.mean(), got.mean(), sum(exact) / 3))
assert torch.allclose(got, torch.tensor([0.5, 2 / 3, 0.5]))
assert abs(sum(exact) / 3 - float(x.mean())) < 1e-6 < abs(float(got.mean() - x.mean()))
PY
