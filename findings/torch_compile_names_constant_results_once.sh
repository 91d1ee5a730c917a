#!/usr/bin/env bash
# torch 2.14.1: torch.compiler.assume_constant_result marks a function whose result a compiled graph may
# take as a constant. Dynamo names that constant after the function, so a graph that calls it with two
# arguments, or calls two functions of one name (closures of one decorator, say), has two constants of
# one name. Backend "eager" runs such a graph and gives the right answer; every backend that goes
# through AOTAutograd, inductor among them, refuses it. A test with backend "eager" shows nothing of it.
#
# Seen: f(x, 1) + f(x, 2) and the sum of two closures run with "eager"; with "aot_eager" both end in
# BackendCompilerFailed, "source ConstantSource(source_name='table') already in seen_sources"; one call
# is fine. Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 torch==2.14.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch


def constant(value: float):
    @torch.compiler.assume_constant_result
    def table(size: int) -> torch.Tensor:
        return torch.full((size,), value)

    return table


ones, twos = constant(1.0), constant(2.0)
ways = {
    "one call": lambda x: x + ones(4),
    "two arguments": lambda x: x + ones(4) + ones(1),
    "two closures": lambda x: x + ones(4) + twos(4),
}
x = torch.zeros(4)
print("torch", torch.__version__)
seen = {}
for backend in ("eager", "aot_eager"):
    for name, way in ways.items():
        torch._dynamo.reset()
        try:
            answer = torch.compile(way, backend=backend)(x)
            assert torch.equal(answer, way(x))
            seen[backend, name] = "right"
        except torch._dynamo.exc.BackendCompilerFailed as error:
            seen[backend, name] = str(error).splitlines()[1]
        print(f"{backend:9} {name:13} {seen[backend, name]}")
assert all(seen["eager", name] == "right" for name in ways)
assert seen["aot_eager", "one call"] == "right"
for name in ("two arguments", "two closures"):
    assert "already in seen_sources" in seen["aot_eager", name]
PY
