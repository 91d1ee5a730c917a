"""A converter for runs in processes of their own: items that take a while, or kill who takes them.

``python slow_items.py OUT --workers 2`` converts 24 items into 6 shards.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Item:
    value: int

    @property
    def name(self) -> str:
        return f"item {self.value}"


@dataclass(frozen=True)
class Slow:
    seconds: float
    deadly: int

    def samples(self, items: Sequence[Item]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for item in items:
            time.sleep(self.seconds)
            if item.value == self.deadly:
                os.abort()
            files = {"caption.txt": b"", "image.png": b"image", "masks.png": b"masks"}
            yield f"{item.value:04d}", {**files, "pid.txt": str(os.getpid()).encode()}


def start(out: Path, *more: object) -> subprocess.Popen[str]:
    """Run this file in a process group of its own."""
    paths = [str(ROOT), str(Path(__file__).parent)]
    return subprocess.Popen(
        [sys.executable, __file__, str(out), *map(str, more)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def main() -> None:
    import slow_items  # by this name, so that other processes find it

    from anystory_core.data.convert import Machines, run, units_of
    from anystory_core.data.manifest import Step

    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--ray", default="")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--deadly", type=int, default=-1)
    options = parser.parse_args()
    items = [slow_items.Item(i) for i in range(24)]
    converter = slow_items.Slow(options.seconds, options.deadly)
    machines = Machines(options.workers, options.ray)
    report = run(
        Step("numbers", {}, {}, len(items)), converter, units_of(items, 4), options.out, machines
    )
    print("\n".join(report.lines()))


if __name__ == "__main__":
    main()
