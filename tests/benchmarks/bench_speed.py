"""Full-size speed and memory: `python3 dev.py bench speed [PART ...] [--json FILE]`.

SDXL's sizes with random weights in bfloat16 on the CPU. Every figure is a ratio to the unpatched
model, measured in the same process in turn with it; operations and bytes are counted. Parts:
operations, memory, references, projections, import, python, profile, times512, times1024. The last
one takes hours on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from speed import memory, operations, parts, python_cost, setting, times

PARTS = (
    "operations", "memory", "references", "projections", "import", "python", "profile", "times512",
    "times1024",
)  # fmt: skip
USUAL = PARTS[:-1]


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def show(table: Any, indent: int = 0) -> None:
    """Nested tables as indented lines."""
    for name, value in table.items():
        if isinstance(value, dict):
            print(" " * indent + str(name))
            show(value, indent + 4)
        else:
            text = f"{value:.4f}" if isinstance(value, float) else str(value)
            print(f"{' ' * indent}{name:<{max(44 - indent, 1)}} {text}")


def main() -> None:
    """Measure the parts that are asked for; print each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default all but the last")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--repetitions", type=int, default=5)
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {sorted(unknown)}, expected some of {list(PARTS)}")
    torch.set_grad_enabled(False)
    setting.start_host()
    benches: list[setting.Bench] = []

    def bench() -> setting.Bench:
        if not benches:  # 5 GB of random numbers, for the parts that need them
            benches.append(setting.Bench.full_size(4))
        return benches[0]

    measures: dict[str, Callable[[], Any]] = {
        "operations": lambda: {
            **operations.measure(bench()), "paths, N = 3": operations.paths(bench()),
        },
        "memory": lambda: {
            **memory.measure(bench()), "1024x1024, N = 2": memory.gpu_1024(bench()),
        },
        "references": lambda: times.reference_net(given.repetitions),
        "projections": lambda: parts.projections(bench()),
        "import": python_cost.import_seconds,
        "python": python_cost.per_block,
        "profile": lambda: parts.profile_step(bench()),
        "times512": lambda: times.measure(bench(), (512, 512), given.repetitions),
        "times1024": lambda: times.measure(bench(), (1024, 1024), given.repetitions, peer=False),
    }  # fmt: skip
    figures: dict[str, Any] = {"machine": machine()}
    show(figures)
    for name in given.parts or USUAL:
        figures[name] = measures[name]()
        show({name: figures[name]})
        sys.stdout.flush()
        if given.json:
            given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
