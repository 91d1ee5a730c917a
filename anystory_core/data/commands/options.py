"""What the commands that write shards have in common: their options, and how they end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .. import paths
from ..convert import Converter, Item, Machines, run, units_of
from ..index import Index
from ..manifest import MANIFEST, Report, Step


def cores() -> int:
    """How many processes can work at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_common(
    parser: argparse.ArgumentParser, *, per_shard: int = 1000, workers: int | None = None
) -> None:
    """Options of every command that makes shards."""
    parser.add_argument("--out", required=True, help="folder of the shards, local or s3://, gs://")
    parser.add_argument(
        "--per-shard", type=int, default=per_shard, help="items a shard; default: %(default)s"
    )
    add_machines(parser, workers=workers)
    parser.add_argument("--name", default="", help="what the source is called, for the manifest")
    parser.add_argument("--source-version", default="", help="and its version")
    parser.add_argument("--licence", default="", help="and its licence")


def add_machines(parser: argparse.ArgumentParser, *, workers: int | None = None) -> None:
    """Who does the work."""
    parser.add_argument(
        "--workers",
        type=int,
        default=workers or cores(),
        help="processes; default: %(default)s",
    )
    parser.add_argument(
        "--ray",
        default="",
        metavar="ADDRESS",
        help='run on Ray instead: "auto", or HOST:PORT (pip install "ray[data]")',
    )


def convert(
    command: str,
    options: argparse.Namespace,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    items: Sequence[Item],
    converter: Converter,
) -> int:
    """Convert all items to shards and say what became of them; the exit code."""
    named = {"name": options.name, "version": options.source_version, "licence": options.licence}
    step = Step(
        command,
        {**source, **named},
        {**settings, "per_shard": options.per_shard},
        len(items),
    )
    machines = Machines(options.workers, options.ray)
    total = run(step, converter, units_of(items, options.per_shard), options.out, machines)
    return say(total, options.out)


def say(total: Report, out: str) -> int:
    """Print what became of the items, and index the shards; the exit code."""
    print("\n".join(total.lines()))
    if not total.samples:
        return 1
    if not paths.is_remote(out):
        Index.of([out])  # so that no run has to read all headers when it starts
    print(f"wrote {paths.join(out, MANIFEST)}")
    return 0
