#!/usr/bin/env bash
# torch 2.14.1: torch.compile does not trace the call of a generic alias. A dataclass whose
# field(default_factory=dict[int, int]) satisfies a strict type checker breaks the graph wherever an
# object is made in compiled code; with default_factory=dict, which does the same, it does not.
#
# Seen: 0 graph breaks with dict, 1 with dict[int, int] ("Dynamo does not know how to trace the
# function `dict[int, int]`"); both return the same numbers.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1
"$folder/venv/bin/python" - <<'PY'
import dataclasses

import torch
from torch._dynamo.utils import counters


def breaks(factory):
    @dataclasses.dataclass
    class Notes:
        kept: dict = dataclasses.field(default_factory=factory)

    def double(x):
        notes = Notes()
        notes.kept[0] = x * 2
        return notes.kept[0]

    torch._dynamo.reset()
    counters.clear()
    x = torch.arange(3.0)
    assert torch.equal(torch.compile(double, backend="eager")(x), 2 * x)
    return sum(counters["graph_break"].values()), list(counters["graph_break"])


plain, alias = breaks(dict), breaks(dict[int, int])
print("torch", torch.__version__, "breaks with dict:", plain[0], "with dict[int, int]:", alias[0])
print(alias[1][0].splitlines()[1].strip())
assert plain[0] == 0 and alias[0] >= 1 and "dict[int, int]" in alias[1][0]
PY
