"""A step of the mini model under the host's TorchCompileModel, with subjects and without."""

from __future__ import annotations

import time
from typing import Any

from .python_cost import mini_bench
from .setting import Step, core, host
from .times import interleave, summary


def measure(repetitions: int) -> dict[str, Any]:
    """Two subjects by the router, and the plain model, each compiled, in turn; what the first step
    of each takes, which compiles, stands beside."""
    backends = host("comfy.ldm.modules.attention")
    for name in ("optimized_attention", "optimized_attention_masked"):
        setattr(backends, name, backends.attention_pytorch)  # as on a GPU
    bench, compiling = mini_bench(2), {}
    models = {"plain": bench.unet.clone(), "2": bench.patched(2, fixed=False)}
    for model in models.values():
        host("comfy_api.torch_helpers").set_torch_compile_wrapper(model=model, backend="inductor")
    result: dict[str, Any] = {}

    def use(steps: dict[str, Step]) -> None:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            compiling[f"first step, {name}, s"] = round(time.perf_counter() - start, 1)
        result.update(compiling, **summary(interleave(steps, repetitions), "plain"))

    side = core("mini.config").PICTURE_SIZE
    bench.with_steps(models, (side, side), use)
    return result
