"""What is paid in Python: the import at host start, and each patched block of a step."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import statistics
import subprocess
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .parts import marked, marked_attention
from .setting import ROOT, Bench, Step, host, make_subject

IMPORT = """
import importlib.machinery, importlib.util, os, sys, asyncio, time
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.options
import utils.extra_config  # first, as in the host's main: comfy/ joins the path and has a utils.py
from comfy.cli_args import args
args.cpu = True
import nodes, server, execution
import comfy_extras.nodes_post_processing
from comfy_api.latest import io
spec = importlib.machinery.ModuleSpec("anystory_pack", None, is_package=True)
spec.submodule_search_locations = [sys.argv[1]]
sys.modules["anystory_pack"] = importlib.util.module_from_spec(spec)
print("-- pack --", file=sys.stderr)
start = time.perf_counter()
import anystory_pack.nodes
print(time.perf_counter() - start)
"""


def import_seconds(repetitions: int = 3) -> dict[str, Any]:
    """Seconds of the pack's import after the host's own, and its slowest modules."""
    plain, slowest = [], []
    for number in range(repetitions + 1):
        flags = ["-X", "importtime"] if number == repetitions else []
        done = subprocess.run(
            [sys.executable, *flags, "-c", IMPORT, str(ROOT)],
            capture_output=True, text=True, env=os.environ,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        if not flags:
            plain.append(float(done.stdout.split()[-1]))
            continue
        ours = done.stderr.rpartition("-- pack --")[2]
        for line in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", ours):
            slowest.append((int(line[0]) / 1e6, line[1]))
    slowest.sort(reverse=True)
    return {
        "s": round(statistics.median(plain), 3),
        "importtime, own s": {name: round(s, 4) for s, name in slowest[:6]},
        "importtime, sum s": round(sum(s for s, _ in slowest), 3),
    }


def mini_bench(subjects: int) -> Bench:
    """The mini model with subjects of random contents."""
    mini = host("nodes.mini")
    anystory = mini.load_anystory()
    config = anystory.model.config
    made = [
        dataclasses.replace(
            make_subject(config, i).map(lambda x: x.float()),
            fingerprint=anystory.model.fingerprint,
        )
        for i in range(subjects)
    ]
    return Bench(mini.load_unet(), anystory, made)


# What makes a host wait for its device: a number is read, or a size depends on values.
_WAITS = (
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim",
    "aten::_unique2", "aten::equal",
)  # fmt: skip

# Methods that a block of the patched model calls, in the host's glue.
PATCHES = ("RoutePatch", "SelfAttentionPatch", "CrossAttentionPatch")


def per_block(repetitions: int = 10, size: int = 128) -> dict[str, Any]:
    """Microseconds of Python that a patched block adds at the mini pictures' size, N = 2.

    Every call of a patch, and of the plain model's two attentions, is under a profiler mark; a
    mark's own time is its wall time without its operators'. Of each call in a step the fewest of
    all repetitions counts: calls are short, so some repetition is free of whoever else runs. What
    the profiler does around an operator is in it: too large rather than too small. ``waits`` are
    operators at which a host would wait for a GPU, in a whole step.
    """
    bench = mini_bench(2)
    plain = bench.unet.clone()
    for site in bench.anystory.model.sites:
        for name, setter in (
            ("attn1", plain.set_model_attn1_replace), ("attn2", plain.set_model_attn2_replace),
        ):  # fmt: skip
            setter(marked_attention(name), site.part, site.number, site.block_index)
    models = {"plain": plain, "N = 2": bench.patched(2, fixed=False)}
    marks = {"plain": ("attn1", "attn2"), "N = 2": PATCHES}
    table: dict[str, Any] = {"repetitions": repetitions}

    def use(steps: dict[str, Step]) -> None:
        for step in steps.values():
            step()
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            for _ in range(repetitions):
                for step in steps.values():
                    step()
        events = profiler.events()
        for name, labels in marks.items():
            table[name] = {label: _calls(events, label, repetitions) for label in labels}
        for name, step in steps.items():
            with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
                step()
            waits = [event for event in profiler.events() if event.name in _WAITS]
            table[name]["waits of a step"] = len(waits)

    with contextlib.ExitStack() as stack, torch.inference_mode():
        for name in PATCHES:
            patch = getattr(host("nodes.host.sdxl.patcher"), name)
            stack.enter_context(marked(name, patch, "__call__"))
        bench.with_steps(models, (size, size), use)
    for key in ("Python, us", "operators"):
        sums = {
            name: sum(table[name][label][key] for label in labels) for name, labels in marks.items()
        }
        table[f"{key}, added per block"] = round(sums["N = 2"] - sums["plain"], 1)
    return table


def _calls(events: Any, label: str, repetitions: int) -> dict[str, float]:
    """Own time and number of operators of a marked call: means over a step's calls."""
    calls = [event for event in events if event.name == label]
    count = len(calls) // repetitions  # in a step
    own = [min(call.self_cpu_time_total for call in calls[i::count]) for i in range(count)]
    operators = [len(call.cpu_children) for call in calls[:count]]
    return {
        "calls": count,
        "Python, us": round(statistics.mean(own), 1),
        "operators": round(statistics.mean(operators), 1),
    }
