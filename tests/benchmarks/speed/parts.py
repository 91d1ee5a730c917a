"""Where a step's time goes, and what the start of a run costs."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile, record_function

from .setting import Bench, Step, core, host


def projections(bench: Bench, repetitions: int = 3) -> dict[str, Any]:
    """Processor seconds that one more subject adds to the start of a run, and a plain step's at
    512x512, in turn."""
    plain: list[float] = []

    def time_plain(steps: dict[str, Step]) -> None:
        steps["plain"]()  # warm-up
        start = time.process_time()
        steps["plain"]()
        plain.append(time.process_time() - start)

    bench.seconds.clear()
    for _ in range(repetitions):
        for count in (1, 3):
            bench.with_steps({str(count): bench.patched(count)}, (512, 512), lambda _: None)
        bench.with_steps({"plain": bench.unet.clone()}, (512, 512), time_plain)
    one, three = (statistics.median(bench.seconds[n]) for n in (1, 3))
    step = statistics.median(plain)
    return {
        "repetitions": repetitions,
        "plain step, cpu s": step,
        "start with 1 subject, cpu s": one,
        "start with 3 subjects, cpu s": three,
        "per subject, cpu s": (three - one) / 2,
        "per subject / plain step": (three - one) / 2 / step,
    }


ROUTER, CLIP = "router", "CLIP branch"
OWN, BOTH = "self-attention without references", "self-attention with references"
# Row of the table -> method whose calls are marked, whichever way of computation it takes.
PARTS = {
    ROUTER: ("injection.call", "Call", "begin_cross_attention"),
    CLIP: ("injection.call", "Call", "cross_attention"),
    BOTH: ("injection.call", "Call", "self_attention"),
}
WITHIN = {  # rows that are part of those above
    "sorting by region": ("injection.keys", "Regions", "of"),
    "routes carried to another grid": ("routing.sources", "LearnedRoutes", "resize"),
}


def profile_step(
    bench: Bench, size: tuple[int, int] = (512, 512), repetitions: int = 3
) -> dict[str, Any]:
    """Seconds of each of our parts in a step with N = 2, children included, from the profiler's
    marks; medians of steps in turn with plain ones, whose self-attention is marked as well."""
    walls: dict[str, list[float]] = {"plain": [], "N = 2": []}
    rows: dict[str, list[dict[str, Any]]] = {"plain": [], "N = 2": []}

    def use(steps: dict[str, Step]) -> None:
        for number in range(repetitions + 1):
            for name, step in steps.items():
                with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
                    start = time.perf_counter()
                    step()
                    wall = time.perf_counter() - start
                if number:  # the first round warms up
                    walls[name].append(wall)
                    rows[name].append({row.key: row for row in profiler.key_averages()})

    unet = bench.unet.clone()
    for site in bench.anystory.model.sites[1:]:
        unet.set_model_attn1_replace(
            marked_attention(OWN), site.part, site.number, site.block_index
        )
    models = {"plain": unet, "N = 2": bench.patched(2)}
    bench.seconds.clear()
    with contextlib.ExitStack() as marks:
        for label, (module, owner, name) in (PARTS | WITHIN).items():
            marks.enter_context(marked(label, getattr(core(module), owner), name))
        bench.with_steps(models, size, use)

    plain = statistics.median(walls["plain"])

    def line(seconds: float, calls: int) -> dict[str, Any]:
        return {"s": seconds, "calls": calls, "share of the plain step": seconds / plain}

    def part(name: str, label: str) -> dict[str, Any]:
        taken = [found[label] for found in rows[name]]
        seconds = statistics.median(row.cpu_time_total for row in taken) / 1e6
        return line(seconds, taken[0].count)

    table: dict[str, Any] = {"repetitions": repetitions, "plain step, s": plain}
    table["step with N = 2, s"] = statistics.median(walls["N = 2"])
    table |= {label: part("N = 2", label) for label in PARTS}
    table[OWN] = part("plain", OWN)
    table["references: the difference"] = line(table[BOTH]["s"] - table[OWN]["s"], 0)
    for label in WITHIN:
        table[f"within: {label}"] = part("N = 2", label)
    python = statistics.median(
        sum(found[label].self_cpu_time_total for label in PARTS) for found in rows["N = 2"]
    )
    table["within: Python"] = line(python / 1e6, 0)
    table["once per run: projections"] = line(bench.seconds[2][0], 0)
    return table


@contextlib.contextmanager
def marked(label: str, owner: Any, name: str) -> Iterator[None]:
    """A method's calls carry a profiler mark."""
    plain = getattr(owner, name)

    def under(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return plain(*args, **kwargs)

    with mock.patch.object(owner, name, under):
        yield


def marked_attention(label: str) -> Any:
    """A replacement that is the host's own attention, under a mark."""
    attention = host("comfy.ldm.modules.attention")

    def replace(q: Any, k: Any, v: Any, options: Any) -> Any:
        with record_function(label):
            return attention.optimized_attention(q, k, v, options["n_heads"])

    return replace
