"""Items -> shards: resumable, parallel over processes or on Ray, with every item accounted for.

The work is cut into units, each of which makes one shard under a name of its own. A shard is
written whole and then noted as done, so a run that was killed and started again redoes what was not
noted, writes it over, and nothing is lost or there twice.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ..errors import DataError
from . import manifest, paths
from .libraries import SetupError
from .manifest import Report, Step
from .parts import kind_of
from .pictures import DAMAGE
from .shards import Files, open_shard, shard_name

DAMAGED = "damaged"
_AHEAD = 2  # units that wait for each process


class Filtered(DataError):
    """An item that the options leave out; its text is the reason, by which such are counted."""


class Item(Protocol):
    """One thing to convert, such as a picture with its annotations; small, and can be pickled."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class LeftOut:
    """An item that made no sample. ``detail`` only of a damaged one."""

    name: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Unread:
    """An item that could not even be listed, so that it is counted among the others."""

    name: str
    why: str


Made = tuple[str, Files] | LeftOut
AnyItem = TypeVar("AnyItem", bound=Item)


class Converter(Protocol):
    """Makes samples of items. It is pickled into the processes that work; what is heavy it loads
    when it is first called."""

    def samples(self, items: Sequence[Any]) -> Iterator[Made]:
        """(key, files) of all samples, and why the other items make none, item by item."""
        ...


@dataclass(frozen=True)
class Unit:
    """What makes one shard."""

    shard: str
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Machines:
    """Who works: ``workers`` processes here, or those of Ray at ``ray`` ("auto", an address)."""

    workers: int = 1
    ray: str = ""


def units_of(items: Sequence[Item], per_shard: int) -> list[Unit]:
    """``shard-000000.tar`` of the first ``per_shard`` items, and so on."""
    starts = range(0, len(items), per_shard)
    return [
        Unit(shard_name(number), tuple(items[start : start + per_shard]))
        for number, start in enumerate(starts)
    ]


def each(
    items: Iterable[AnyItem | Unread], convert: Callable[[AnyItem], Iterable[tuple[str, Files]]]
) -> Iterator[Made]:
    """All samples of each item, or why it has none: its damage makes no other item fail."""
    for item in items:
        if isinstance(item, Unread):
            yield LeftOut(item.name, DAMAGED, item.why)
            continue
        try:
            made = list(convert(item))
        except SetupError:
            raise
        except Filtered as error:
            yield LeftOut(item.name, str(error))
        except DataError as error:
            yield LeftOut(item.name, DAMAGED, str(error))
        except (*DAMAGE, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
            yield LeftOut(item.name, DAMAGED, f"{type(error).__name__}: {error}")
        else:
            yield from made


def convert_unit(
    converter: Converter, unit: Unit, out: str, command: str, tick: Callable[[], object] = int
) -> Report:
    """Make one shard and note it as done. ``tick`` is called for every sample and every item that
    was left out."""
    report = Report(items=len(unit.items))
    seen: set[str] = set()
    with open_shard(paths.join(out, unit.shard)) as shard:
        for made in converter.samples(unit.items):
            tick()
            if not isinstance(made, LeftOut) and made[0] in seen:
                made = LeftOut(made[0], DAMAGED, "its key is there already")
            if isinstance(made, LeftOut):
                report.left_out[made.reason] += 1
                if made.detail and len(report.bad) < manifest.SHOWN:
                    report.bad.append(_named(made))
                continue
            key, files = made
            seen.add(key)
            shard.add(key, files)
            report.samples += 1
            report.kinds.update(filter(None, [kind_of(files)]))
            report.bytes += sum(map(len, files.values()))
    manifest.write_report(out, unit.shard, command, report)
    return report


def run(
    step: Step, converter: Converter, units: Sequence[Unit], out: str, machines: Machines
) -> Report:
    """Do the units that are not done yet; the sum of all. DataError when the folder holds another
    run's shards, or a disk refuses."""
    paths.make_folder(out)
    manifest.begin(out, step)
    done: dict[str, Report] = {}
    for unit in units:
        report = manifest.read_report(out, unit.shard, step.command)
        if report is not None:
            done[unit.shard] = report
    left = [unit for unit in units if unit.shard not in done]
    with _Bar(step.command, units, done) as bar:
        if machines.ray:
            from .on_ray import convert_on_ray

            finished = convert_on_ray(machines.ray, converter, left, out, step.command)
        elif machines.workers > 1 and left:
            finished = _in_processes(converter, left, out, step.command, machines.workers)
        else:
            finished = _here(converter, left, out, step.command)
        for shard, report in finished:
            done[shard] = report
            bar.add(report)
    return manifest.finish(out, step, {unit.shard: done[unit.shard] for unit in units})


def _here(
    converter: Converter, units: Sequence[Unit], out: str, command: str
) -> Iterator[tuple[str, Report]]:
    for unit in units:
        yield unit.shard, convert_unit(converter, unit, out, command)


def _in_processes(
    converter: Converter, units: Sequence[Unit], out: str, command: str, workers: int
) -> Iterator[tuple[str, Report]]:
    """A library that takes its process down with a damaged file costs that file, not the run."""
    waiting = list(reversed(units))
    suspects: list[Unit] = []
    while waiting:
        with _pool(converter, min(workers, len(waiting))) as pool:
            running: dict[Future[Report], Unit] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < _AHEAD * workers:
                        unit = waiting.pop()
                        running[pool.submit(_work, unit, out, command)] = unit
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        report = future.result()
                        yield running.pop(future).shard, report
            except BrokenProcessPool:
                suspects += running.values()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    for unit in suspects:
        names = frozenset(item.name for item in _survivors(converter, unit.items))
        with _pool(_Surviving(converter, names), 1) as pool:
            try:
                yield unit.shard, pool.submit(_work, unit, out, command).result()
            except BrokenProcessPool as error:
                raise DataError(
                    f"{unit.shard}: the process that makes it dies, and by no single item; is "
                    "there enough memory? Fewer --workers need less"
                ) from error


def _survivors(converter: Converter, items: tuple[Any, ...]) -> tuple[Any, ...]:
    """The items that do not kill the process that converts them, by halving."""
    with _pool(converter, 1) as pool:
        try:
            pool.submit(_try, items).result()
            return items
        except BrokenProcessPool:
            if len(items) == 1:
                return ()
    half = len(items) // 2
    return _survivors(converter, items[:half]) + _survivors(converter, items[half:])


@dataclass(frozen=True)
class _Surviving:
    """A converter that keeps away from the items that kill."""

    converter: Converter
    names: frozenset[str]

    def samples(self, items: Sequence[Any]) -> Iterator[Made]:
        for item in items:
            if item.name not in self.names:
                yield LeftOut(item.name, DAMAGED, "the process that converted it died")
        yield from self.converter.samples([i for i in items if i.name in self.names])


_mine: list[Converter] = []  # of a working process


def _pool(converter: Converter, workers: int) -> ProcessPoolExecutor:
    # Spawned: libraries with threads of their own, torch's among them, do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    return ProcessPoolExecutor(workers, context, _start, (converter, counter, workers))


def _start(converter: Converter, counter: Any, workers: int) -> None:
    with counter.get_lock():
        os.environ["ANYSTORY_WORKER"] = str(counter.value)  # by which it chooses its device
        counter.value += 1
    if workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    _mine[:] = [converter]


def _work(unit: Unit, out: str, command: str) -> Report:
    return convert_unit(_mine[0], unit, out, command)


def _try(items: tuple[Any, ...]) -> None:
    for _ in _mine[0].samples(items):
        pass


def _named(made: LeftOut) -> str:
    return made.detail if made.detail.startswith(made.name) else f"{made.name}: {made.detail}"


class _Bar:
    """A bar of items, with what was left out so far."""

    def __init__(self, command: str, units: Sequence[Unit], done: dict[str, Report]) -> None:
        from .progress import bar

        total = sum(len(unit.items) for unit in units)
        self._bar = bar(command, total, sum(report.items for report in done.values()))
        self._left = sum(sum(report.left_out.values()) for report in done.values())

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, report: Report) -> None:
        self._left += sum(report.left_out.values())
        self._bar.update(report.items)
        self._bar.set_postfix_str(f"{self._left} left out")
