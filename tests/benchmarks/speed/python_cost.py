"""What is paid in Python: the import at host start, and each patched block of a step."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .setting import ROOT, Bench, Step, core, host, make_subject

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
    import dataclasses

    made = [
        dataclasses.replace(
            make_subject(config, i).map(lambda x: x.float()),
            fingerprint=anystory.model.fingerprint,
        )
        for i in range(subjects)
    ]
    return Bench(mini.load_unet(), anystory, made)


def per_block(repetitions: int = 30, size: int = 256) -> dict[str, Any]:
    """Microseconds of Python per block at the mini size: wall time minus operators' time.

    Operators' time is the sum of the profiler's own-time over all of them. The profiler slows both
    down, so it counts operators only; wall time is taken without it."""
    bench = mini_bench(2)
    blocks = len(core("sites").build_sites(bench.anystory.model.config.unet))
    models = {"plain": bench.unet.clone(), "N = 2": bench.patched(2)}
    table: dict[str, Any] = {}

    def use(steps: dict[str, Step]) -> None:
        for name, step in steps.items():
            step()
            wall = []
            for _ in range(repetitions):
                start = time.process_time()
                step()
                wall.append(time.process_time() - start)
            with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
                start = time.process_time()
                for _ in range(repetitions // 3):
                    step()
                under = (time.process_time() - start) / (repetitions // 3)
            rows = profiler.key_averages()
            operators = sum(row.self_cpu_time_total for row in rows) / (repetitions // 3)
            table[name] = {
                "step, us": round(statistics.median(wall) * 1e6),
                "step under the profiler, us": round(under * 1e6),
                "operators, us": round(operators),
                "number of operators": sum(row.count for row in rows) // (repetitions // 3),
            }
        for key, out in (
            ("step, us", "Python per block, us"),
            ("step under the profiler, us", "Python per block under the profiler, us"),
        ):
            python = {name: table[name][key] - table[name]["operators, us"] for name in steps}
            table[out] = round((python["N = 2"] - python["plain"]) / blocks, 1)
        table["added per block in all, us"] = round(
            (table["N = 2"]["step, us"] - table["plain"]["step, us"]) / blocks, 1
        )

    with torch.inference_mode():
        bench.with_steps(models, (size, size), use)
    return table
