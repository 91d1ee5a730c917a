"""What was answered of each task, on disk, so that measuring goes on where it was cut off.

A row's tasks are measured :data:`~.passes.BATCH` at a time; the answers of each such unit are a
file, ``ROW/SUBJECTS-NUMBER.json``, with the weights that they are valid for. Units are measured by
several processes at once, and a row may be given more tasks at any later time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .bench import Answer, Bench, Row
from .passes import parts
from .report import slug
from .tasks import task


@dataclass(frozen=True)
class Unit:
    """Some tasks of a row, with equally many subjects."""

    row: Row
    subjects: int
    numbers: range

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.row.name}, tasks {self.numbers[0]} to {self.numbers[-1]} of {self.subjects}"


def units(row: Row, numbers: range) -> list[Unit]:
    """The tasks of a row with these numbers, which its counts of subjects share."""
    own = numbers[: len(numbers) // len(row.counts)]
    return [Unit(row, count, part) for count in row.counts for part in parts(own)]


@dataclass(frozen=True)
class Answers:
    """A folder of them."""

    folder: Path

    def _file(self, unit: Unit) -> Path:
        return self.folder / slug(unit.row.name) / f"{unit.subjects}-{unit.numbers[0]:05d}.json"

    def has_any(self, row: Row) -> bool:
        """Whether a row was ever measured."""
        return (self.folder / slug(row.name)).exists()

    def read(self, unit: Unit, key: str) -> list[Answer]:
        """One for each of the unit's tasks; none when they are not all there for ``key``."""
        file = self._file(unit)
        if not file.exists():
            return []
        saved = json.loads(file.read_text())
        found = saved["answers"][: len(unit.numbers)]
        return found if saved["weights"] == key and len(found) == len(unit.numbers) else []

    def measure(self, unit: Unit, bench: Bench) -> float:
        """Measure a unit and write its answers; returns the seconds it took."""
        start = time.monotonic()
        row = unit.row
        subjects = row.judge(bench).subjects
        answers = row.answers(bench, [task(subjects, unit.subjects, n) for n in unit.numbers])
        file = self._file(unit)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(
            json.dumps({"weights": bench.key(row.model), "answers": answers}) + "\n"
        )
        os.replace(temporary, file)
        return time.monotonic() - start

    def missing(self, rows: Sequence[Row], numbers: range, bench: Bench) -> list[Unit]:
        """What is left to measure, row by row."""
        return [
            unit
            for row in rows
            for unit in units(row, numbers)
            if not self.read(unit, bench.key(row.model))
        ]

    def of(self, row: Row, numbers: range, bench: Bench) -> list[Answer]:
        """All of a row's that are there."""
        key = bench.key(row.model)
        return [answer for unit in units(row, numbers) for answer in self.read(unit, key)]
