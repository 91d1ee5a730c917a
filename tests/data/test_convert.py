"""The runner: what is cut off goes on, what dies is left out, nothing is lost or there twice."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import slow_items
import tiny

from anystory_core.data import shards
from anystory_core.data.convert import LeftOut, Machines, Made, convert_unit, run, units_of
from anystory_core.data.index import Index
from anystory_core.data.manifest import Step, read_steps, source_name
from anystory_core.errors import DataError


@dataclass(frozen=True)
class Number:
    value: int

    @property
    def name(self) -> str:
        return f"item {self.value}"


@dataclass
class Numbers:
    """One scene a number; odd thousands are damaged. ``until``: an item at which all ends."""

    until: int = -1
    seen: tuple[int, ...] = ()

    def samples(self, items: Sequence[Number]) -> Iterator[Made]:
        (_, files), *_ = tiny.scenes(1)
        for item in items:
            if item.value == self.until:
                raise KeyboardInterrupt
            self.seen += (item.value,)
            if item.value % 10 == 3:
                yield LeftOut(item.name, "damaged", "odd")
            elif item.value % 10 == 4:
                yield LeftOut(item.name, "small")
            else:
                yield f"{item.value:04d}", files


STEP = Step("numbers", {"path": "here", "name": "counting"}, {"colour": "red"}, 30)
UNITS = units_of([Number(i) for i in range(30)], 7)


def test_a_run_that_is_cut_off_goes_on(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    first = Numbers(until=16)
    with pytest.raises(KeyboardInterrupt):
        run(STEP, first, UNITS, out, Machines())
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.tar")}
    assert len(kept) == 2 and not list((tmp_path / "out").glob("*.tmp"))
    assert not read_steps(out)[0]["finished"]
    second = Numbers()
    report = run(STEP, second, UNITS, out, Machines())
    assert second.seen == tuple(range(14, 30))
    for name, changed in kept.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == changed
    names = [entry.name for entry in Index.of([out])]
    assert names == [f"{i:04d}" for i in range(30) if i % 10 not in (3, 4)]
    assert report.samples == 24 and report.items == 30
    (step,) = read_steps(out)
    assert step["left_out"] == {"damaged": 3, "small": 3} and step["bad"][0] == "item 3: odd"
    assert step["kinds"] == {"scene": 24} and step["finished"] and step["options"] == STEP.options
    assert sum(shard["samples"] for shard in step["shards"].values()) == 24
    assert source_name(out) == "counting"
    run(STEP, third := Numbers(), UNITS, out, Machines())
    assert not third.seen


def test_another_run_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path)
    run(STEP, Numbers(), UNITS, out, Machines())
    for other, words in [
        (Step("numbers", STEP.source, {"colour": "blue"}, 30), "colour was 'red', is 'blue'"),
        (Step("numbers", STEP.source, STEP.options, 31), "another items: was 30, is 31"),
        (Step("numbers", {"path": "there"}, STEP.options, 30), "path was 'here', is 'there'"),
    ]:
        with pytest.raises(DataError, match=words):
            run(other, Numbers(), UNITS, out, Machines())
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="manifest.json cannot be read"):
        run(STEP, Numbers(), UNITS, out, Machines())


def test_a_lost_shard_is_made_again(tmp_path: Path) -> None:
    out = str(tmp_path)
    run(STEP, Numbers(), UNITS, out, Machines())
    whole = {file.name: file.read_bytes() for file in tmp_path.glob("*.tar")}
    (tmp_path / "shard-000001.tar").unlink()
    (tmp_path / "shard-000003.tar.numbers.json").write_text("{")
    run(STEP, again := Numbers(), UNITS, out, Machines())
    assert again.seen == (*range(7, 14), *range(21, 28))
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.tar")} == whole


def test_a_key_twice_is_left_out(tmp_path: Path) -> None:
    unit = units_of([Number(1), Number(1), Number(2)], 3)[0]
    report = convert_unit(Numbers(), unit, str(tmp_path), "numbers")
    assert report.samples == 2 and report.bad == ["0001: its key is there already"]


def test_a_unit_without_samples_makes_no_shard(tmp_path: Path) -> None:
    report = run(
        Step("numbers", {}, {}, 1), Numbers(), units_of([Number(3)], 1), str(tmp_path), Machines()
    )
    assert report.samples == 0 and not list(tmp_path.glob("*.tar"))


def test_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half shard lies under a shard's name, and nothing says that it is done."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.Shard, "add", full)
    with pytest.raises(DataError, match=r"shard-000000\.tar cannot be written .*No space left"):
        run(STEP, Numbers(), UNITS, str(tmp_path), Machines())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json"]


def started(out: Path, *more: object) -> Any:
    return slow_items.start(out, *more)


def test_processes_one_of_which_dies_of_its_item(tmp_path: Path) -> None:
    """Item 11 kills its process (as a library written in C may): it alone is left out."""
    process = started(tmp_path / "out", "--workers", 2, "--deadly", 11)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "left out, damaged: 1" in said and "item 11: the process that converted it died" in said
    names = [entry.name for entry in Index.of([str(tmp_path / "out")])]
    assert names == [f"{i:04d}" for i in range(24) if i != 11]


def test_a_killed_run_in_processes_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(out, "--workers", 2, "--seconds", 0.1)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.numbers.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    done = {path.name for path in out.glob("*.numbers.json")}
    assert 0 < len(done) < 6
    said, _ = started(out, "--workers", 2).communicate(timeout=60)
    names = [entry.name for entry in Index.of([str(out)])]
    assert names == [f"{i:04d}" for i in range(24)], said
    assert json.loads((out / "manifest.json").read_text())["steps"][0]["samples"] == 24
