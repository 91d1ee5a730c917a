"""Measuring goes on where it was cut off: what was answered of which tasks, for which weights."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")

from lab.evaluation import answers as module
from lab.evaluation.answers import Answers, units
from lab.evaluation.bench import Bench
from lab.evaluation.passes import BATCH
from lab.evaluation.rows import ROWS


@dataclass
class Numbers:
    """A row that answers with the tasks' numbers and remembers what it was asked."""

    name: str = "numbers"
    model: str = "full"
    counts: tuple[int, ...] = (1,)
    asked: list[list[tuple[int, int]]] = field(default_factory=list)

    def judge(self, bench: Any) -> Any:
        return bench

    def answers(self, bench: Any, tasks: Sequence[tuple[int, int]]) -> list[dict[str, int]]:
        self.asked.append(list(tasks))
        return [{"count": count, "number": number} for count, number in tasks]

    def figures(self, answers: Any) -> Any:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def tasks_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "task", lambda subjects, count, number: (count, number))


def bench(key: str = "weights") -> Bench:
    return cast(Any, SimpleNamespace(subjects=(), key=lambda model: f"{key} {model}"))


def test_a_row_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    row, kept = Numbers(), Answers(tmp_path)
    numbers = range(500, 500 + 2 * BATCH + 4)
    assert not kept.has_any(row)
    first, second, last = kept.missing([row], numbers, bench())
    assert (first.numbers, last.numbers) == (numbers[:BATCH], numbers[2 * BATCH :])
    kept.measure(second, bench())
    assert kept.has_any(row)
    assert [unit.numbers for unit in kept.missing([row], numbers, bench())] == [
        first.numbers,
        last.numbers,
    ]
    assert [a["number"] for a in kept.of(row, numbers, bench())] == list(second.numbers)
    for unit in (first, last):
        kept.measure(unit, bench())
    assert not kept.missing([row], numbers, bench())
    assert [a["number"] for a in kept.of(row, numbers, bench())] == list(numbers)
    assert [len(asked) for asked in row.asked] == [BATCH, BATCH, 4]


def test_more_tasks_later_and_fewer(tmp_path: Path) -> None:
    row, kept = Numbers(), Answers(tmp_path)
    for unit in units(row, range(BATCH + 4)):
        kept.measure(unit, bench())
    more = range(2 * BATCH)
    (left,) = kept.missing([row], more, bench())  # the one that had four
    assert left.numbers == more[BATCH:]
    assert len(kept.of(row, more, bench())) == BATCH
    kept.measure(left, bench())
    assert [a["number"] for a in kept.of(row, range(BATCH + 7), bench())] == list(range(BATCH + 7))


def test_other_weights_are_measured_again(tmp_path: Path) -> None:
    row, kept = Numbers(), Answers(tmp_path)
    (unit,) = units(row, range(3))
    kept.measure(unit, bench("old"))
    assert kept.missing([row], range(3), bench("new")) == [unit]
    assert kept.of(row, range(3), bench("new")) == []
    assert len(kept.of(row, range(3), bench("old"))) == 3


def test_scenes_of_two_and_of_three_share_a_row(tmp_path: Path) -> None:
    row, kept = Numbers(counts=(2, 3)), Answers(tmp_path)
    for unit in units(row, range(2 * BATCH + 8)):
        kept.measure(unit, bench())
    found = [(a["count"], a["number"]) for a in kept.of(row, range(2 * BATCH + 8), bench())]
    assert found == [(count, n) for count in (2, 3) for n in range(BATCH + 4)]


def test_what_is_half_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, kept = Numbers(), Answers(tmp_path)
    (unit,) = units(row, range(3))

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            kept.measure(unit, bench())
    assert kept.missing([row], range(3), bench()) == [unit]
    kept.measure(unit, bench())
    (file,) = (tmp_path / "numbers").iterdir()
    assert json.loads(file.read_text())["weights"] == "weights full"


def test_rows_have_names_of_their_own() -> None:
    names = {module.slug(row.name) for row in ROWS}
    assert len(names) == len(ROWS)  # the folders of their answers
