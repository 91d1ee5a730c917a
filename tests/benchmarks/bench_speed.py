"""Full-size speed and memory: `python3 dev.py bench speed [PART ...]`.

SDXL's sizes with random weights in bfloat16 on one thread of the CPU, steps and projections with
``--float32`` in what the host takes there unless it is told else. Every figure is a ratio to the
unpatched model, measured in the same process in turn with it; operations and bytes are counted.
Prints the table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from speed import compiled, memory, once, operations, parts, python_cost, setting, times

PARTS = (
    "operations", "memory", "references", "projections", "import", "python", "load", "encode",
    "profile", "times512", "times1024", "compiled",
)  # fmt: skip
USUAL = PARTS[:-2]  # the last two take long, or the attention of the host for themselves
OF_FULL_SIZE = ("projections", "profile", "times512", "times1024")  # in a number type of choice
JSON = Path(__file__).resolve().parents[2] / ".dev" / "bench-speed.json"


def machine(dtype: torch.dtype) -> dict[str, Any]:
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
        "numbers": str(dtype).removeprefix("torch."),
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
    parser.add_argument(
        "parts", nargs="*", help=f"of {', '.join(PARTS)}; default all but the last two"
    )
    parser.add_argument("--json", type=Path, default=JSON, help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=5, help="of timed steps; default 5")
    parser.add_argument(
        "--pytorch-attention", action="store_true", help="of the plain model, too: as on a GPU"
    )
    parser.add_argument(
        "--float32", action="store_true", help=f"of {', '.join(OF_FULL_SIZE)}; needs 20 GB"
    )
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {sorted(unknown)}, expected some of {list(PARTS)}")
    names = given.parts or USUAL
    if given.float32 and (others := set(names) - set(OF_FULL_SIZE)):
        parser.error(f"--float32: name parts of {', '.join(OF_FULL_SIZE)}; not {sorted(others)}")
    dtype = torch.float32 if given.float32 else setting.DTYPE
    torch.set_grad_enabled(False)
    setting.start_host(*(["use_pytorch_cross_attention"] if given.pytorch_attention else []))

    @functools.cache
    def bench(filled: bool = True) -> setting.Bench:  # 7 GB of numbers for the parts that take time
        return setting.Bench.full_size(4, dtype, filled=filled)

    measures: dict[str, Callable[[], Any]] = {
        "operations": lambda: {
            **operations.measure(bench(filled=False)),
            "paths at 1024x1024, over plain": operations.paths(bench(filled=False)),
        },
        "memory": lambda: {
            **memory.measure(bench(filled=False)),
            "1024x1024, N = 2": memory.gpu_1024(bench(filled=False)),
        },
        "references": lambda: times.reference_net(given.repetitions),
        "projections": lambda: parts.projections(bench()),
        "import": python_cost.import_seconds,
        "python": python_cost.per_block,
        "load": lambda: once.load(given.repetitions),
        "encode": lambda: once.encode(given.repetitions),
        "profile": lambda: parts.profile_step(bench()),
        "times512": lambda: times.measure(bench(), (512, 512), given.repetitions),
        "times1024": lambda: times.measure(
            bench(), (1024, 1024), given.repetitions, counts=(1, 3), peer=False
        ),
        "compiled": lambda: compiled.measure(given.repetitions),
    }  # fmt: skip
    figures: dict[str, Any] = {"machine": machine(dtype)}
    show(figures)
    for name in names:
        figures[name] = measures[name]()
        show({name: figures[name]})
        sys.stdout.flush()
        given.json.parent.mkdir(exist_ok=True)
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
