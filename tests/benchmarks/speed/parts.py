"""Where a step's time goes, and what the start of a run costs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .setting import Bench, Step, core


def projections(bench: Bench, repetitions: int = 3) -> dict[str, Any]:
    """Seconds that one more subject adds to the start of a run, beside a plain step at 512x512."""
    plain: list[float] = []

    def time_plain(steps: dict[str, Step]) -> None:
        steps["plain"]()
        for _ in range(repetitions):
            start = time.perf_counter()
            steps["plain"]()
            plain.append(time.perf_counter() - start)

    bench.seconds.clear()
    bench.with_steps({"plain": bench.unet.clone()}, (512, 512), time_plain)
    for _ in range(repetitions):
        for count in (1, 3):
            model = {str(count): bench.patched(count)}
            bench.with_steps(model, (512, 512), lambda _: None)
    one, three = (statistics.median(bench.seconds[n]) for n in (1, 3))
    step = statistics.median(plain)
    return {
        "plain step, s": step,
        "start with 1 subject, s": one,
        "start with 3 subjects, s": three,
        "per subject, s": (three - one) / 2,
        "per subject / plain step": (three - one) / 2 / step,
    }


# Name in the table -> functions whose calls are marked: (module of the core, attribute).
_PARTS = {
    "routers": ("routes", "LearnedRoutes.maps"),
    "routes carried to other grids": ("routes", "LearnedRoutes.resize"),
    "sorting by region": ("injection", "Regions.of"),
    "CLIP branch": ("injection", "clip_by_region"),
    "self-attention with references": ("injection", "reference_by_region"),
}


def profile_step(bench: Bench, size: tuple[int, int] = (512, 512)) -> dict[str, Any]:
    """Share of each of our parts in a step with N = 2, with children, from the profiler's marks.

    The self-attention's part holds the U-Net's own attention as well: both are one call."""
    table: dict[str, Any] = {}
    undo = [_mark(name, *where) for name, where in _PARTS.items()]

    def use(steps: dict[str, Step]) -> None:
        steps["N = 2"]()
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            start = time.perf_counter()
            steps["N = 2"]()
            whole = (time.perf_counter() - start) * 1e6
        rows = {row.key: row for row in profiler.key_averages()}
        for name in _PARTS:
            if name in rows:
                table[name] = {
                    "calls": rows[name].count,
                    "share of the step": rows[name].cpu_time_total / whole,
                }

    try:
        with torch.no_grad():
            bench.with_steps({"N = 2": bench.patched(2, fixed=False)}, size, use)
    finally:
        for restore in undo:
            restore()
    return table


def _mark(label: str, module: str, attribute: str) -> Any:
    """Wrap a function of the core in a profiler mark; returns what takes the mark away."""
    owner: Any = core(module)
    *path, name = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    before = owner.__dict__[name]
    plain = getattr(owner, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return plain(*args, **kwargs)

    setattr(owner, name, staticmethod(marked) if isinstance(before, classmethod) else marked)
    return lambda: setattr(owner, name, before)
