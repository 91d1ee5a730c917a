"""``manifest.json`` beside shards: where they are from, how they were made, what was left out.

Each command that wrote or changed the samples is a step in it. What a step made of one shard lies
beside that shard, in ``SHARD.COMMAND.json``, so that a run that was cut off goes on where it was.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any, cast

from ..errors import DataError
from . import paths

MANIFEST = "manifest.json"
SHOWN = 20  # names of damaged items that a report and the manifest keep
_FORMAT = 1  # of the samples and of this file
_FIXED = ("command", "source", "options", "items")  # what a run that goes on may not change


@dataclass
class Report:
    """What became of some items. ``left_out``: reason -> how many; ``bad``: the first damaged ones
    by name and why."""

    items: int = 0
    samples: int = 0
    bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    left_out: Counter[str] = field(default_factory=Counter[str])
    bad: list[str] = field(default_factory=list[str])

    def add(self, other: Report) -> None:
        """Count another's too."""
        self.items += other.items
        self.samples += other.samples
        self.bytes += other.bytes
        self.kinds += other.kinds
        self.left_out += other.left_out
        self.bad = [*self.bad, *other.bad][:SHOWN]

    def table(self) -> dict[str, Any]:
        """For a JSON file."""
        return dict(vars(self))

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Report:
        """Of :meth:`table`. KeyError, TypeError or ValueError when it is none."""
        kinds, left_out = Counter[str](table["kinds"]), Counter[str](table["left_out"])
        items, samples, size = (int(table[name]) for name in ("items", "samples", "bytes"))
        return cls(items, samples, size, kinds, left_out, [str(text) for text in table["bad"]])

    def lines(self) -> list[str]:
        """For a person."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        lines = [f"{self.samples} samples ({kinds or 'none'}) of {self.items} items"]
        lines += [f"  left out, {why}: {count}" for why, count in self.left_out.most_common()]
        return lines + [f"  {name}" for name in self.bad]


@dataclass(frozen=True)
class Step:
    """One run of one command over a folder."""

    command: str
    source: Mapping[str, Any]  # path, name, version, licence
    options: Mapping[str, Any]
    items: int

    def described(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


def begin(out: str, step: Step) -> None:
    """Note a step that starts or goes on. DataError when the folder holds the same step with other
    settings."""
    steps = read_steps(out)
    wanted = step.described()
    for found in steps:
        if found["command"] != step.command:
            continue
        for name in _FIXED:
            if found[name] != wanted[name]:
                raise DataError(
                    f"{out} was begun with another {name}: {_difference(found[name], wanted[name])}"
                    ". Name another folder, or delete this one"
                )
        return
    _write(out, [*steps, {**wanted, "finished": False}])


def finish(out: str, step: Step, shards: Mapping[str, Report]) -> Report:
    """Write a step's counts; their sum."""
    total = Report()
    for report in shards.values():
        total.add(report)
    listed = {name: {"samples": r.samples, "bytes": r.bytes} for name, r in shards.items()}
    done = {
        **step.described(),
        "finished": True,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **total.table(),
        "shards": {name: numbers for name, numbers in listed.items() if numbers["samples"]},
    }
    _write(out, [done if s["command"] == step.command else s for s in read_steps(out)])
    return total


def read_steps(folder: str) -> list[dict[str, Any]]:
    """The steps of a folder's manifest, [] without one. DataError when it cannot be read."""
    path = paths.join(folder, MANIFEST)
    try:
        if not paths.exists(path):
            return []
        table: dict[str, Any] = json.loads(paths.read(path))
        steps: list[dict[str, Any]] = table["steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it") from error
    return steps


def source_name(folder: str) -> str:
    """What the samples of a folder are from: its manifest's word, else the folder's name."""
    for step in read_steps(folder):
        name = step.get("source", {}).get("name")
        if name:
            return str(name)
    return paths.name_of(folder)


def read_report(out: str, shard: str, command: str) -> Report | None:
    """What a step made of a shard, when it has been done and the shard is still there."""
    path = paths.join(out, f"{shard}.{command}.json")
    try:
        if not paths.exists(path):
            return None
        report = Report.of(json.loads(paths.read(path)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if not report.samples or paths.exists(paths.join(out, shard)) else None


def write_report(out: str, shard: str, command: str, report: Report) -> None:
    """Say that a shard is done."""
    path = paths.join(out, f"{shard}.{command}.json")
    paths.write(path, json.dumps(report.table(), ensure_ascii=False).encode())


def _write(out: str, steps: Sequence[Mapping[str, Any]]) -> None:
    table = {"format": _FORMAT, "steps": steps}
    text = json.dumps(table, ensure_ascii=False, indent=1)
    paths.write(paths.join(out, MANIFEST), text.encode())


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        one, other = cast("dict[str, Any]", found), cast("dict[str, Any]", wanted)
        names: Iterable[str] = sorted({*one, *other})
        changed = [n for n in names if one.get(n) != other.get(n)]
        return ", ".join(f"{n} was {one.get(n)!r}, is {other.get(n)!r}" for n in changed)
    return f"was {found!r}, is {wanted!r}"
