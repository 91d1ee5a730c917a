"""The paper's claims as numbers on the mini model: ``python -m lab.evaluate``.

Draws held-out subjects in held-out scenes and writes ``evaluation.json``, ``evaluation.md`` and a
sheet of pictures per row to ``--out``, and there what was answered of each task
(:mod:`.evaluation.answers`): the same command goes on where it was cut off, and with more
``--samples`` only the others are drawn. The sources are fetched into the recipe's folder when they
are missing there; the measuring networks are those of the repository
(:mod:`.measuring.networks`), whatever is measured. What the rows are: :mod:`.evaluation.rows`.
What was chosen by looking at the first tasks is measured on others, from ``--first`` on. A row
whose weights were never trained is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystory_core.mini.weights import FOLDER
from anystory_core.mini.weights import path as weights_path
from anystory_core.weights.model import AnyStoryModel

from .evaluation import report
from .evaluation.answers import Answers, Unit
from .evaluation.bench import Bench
from .evaluation.judge import Judge
from .evaluation.rows import ROWS
from .evaluation.stack import load_anystory, stack_of_files, stack_of_work
from .evaluation.tasks import Task, held_out_subjects, training_subjects
from .phase import run_shared, shares
from .stages import WHOLE_FILE
from .world.emoji import download


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    work: Path
    out: Path
    samples: int
    first: int
    rows: Sequence[str]
    shipped: bool
    processes: int

    @property
    def numbers(self) -> range:
        """Of the tasks of each row."""
        return range(self.first, self.first + self.samples)

    @property
    def answers(self) -> Answers:
        """Where they are kept."""
        return Answers(self.out / "answers")


def find_models(work: Path, *, shipped: bool) -> dict[str, AnyStoryModel]:
    """The trained models that are there: "full" and the ablations."""
    files = {
        "full": weights_path("anystory") if shipped else work / WHOLE_FILE,
        "no clip": work / "no_clip" / "anystory_subject.safetensors",
        "no reference": work / "no_reference" / "anystory_subject.safetensors",
        "no refinement": work / "no_refinement" / WHOLE_FILE.name,
    }
    return {name: load_anystory(file) for name, file in files.items() if file.exists()}


def make_bench(options: Options) -> Bench:
    """Load everything that rows are measured with."""
    sources = options.work / "sources"
    judge = Judge.load(held_out_subjects(sources))
    trained = dataclasses.replace(judge, subjects=tuple(training_subjects(sources)))

    def keep(name: str, tasks: Sequence[Task], pictures: Tensor) -> None:
        if tasks[0].number == options.first:
            report.write_sheet(options.out / f"{report.slug(name)}.jpg", tasks, pictures)

    return Bench(
        stack_of_files(FOLDER) if options.shipped else stack_of_work(options.work),
        find_models(options.work, shipped=options.shipped),
        judge,
        trained,
        keep,
    )


def measure(options: Options, missing: Sequence[Unit]) -> None:
    """This process's share of what is missing."""
    torch.set_flush_denormal(True)
    part, parts = shares()
    own = missing[part::parts]
    bench = make_bench(options)
    for done, unit in enumerate(own, start=1):
        seconds = options.answers.measure(unit, bench)
        print(f"{unit.name}: {seconds:.0f} s, {done} of {len(own)} units", flush=True)


def write_table(options: Options, bench: Bench) -> None:
    """Figures of all rows that were answered, of as many of the tasks as were."""
    table: dict[str, Any] = {}
    for row in ROWS:
        there = options.answers.has_any(row) and bench.has(row.model)
        answers = options.answers.of(row, options.numbers, bench) if there else []
        if answers:
            figures = {k: dataclasses.asdict(v) for k, v in row.figures(answers).items()}
            table[row.name] = {"samples": len(answers), "figures": figures}
            print(report.line(row.name, table[row.name]), flush=True)
    written = json.dumps({"first": options.first, "rows": table}, indent=1) + "\n"
    (options.out / "evaluation.json").write_text(written)
    (options.out / "evaluation.md").write_text(report.markdown(table))


def main() -> None:
    """Parse the command line, load everything, measure what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the recipe's folder")
    parser.add_argument("--out", type=Path, required=True, help="where table and sheets go")
    parser.add_argument("--samples", type=int, default=500, help="of each row")
    parser.add_argument("--first", type=int, default=0, help="number of the first task")
    parser.add_argument(
        "--rows", nargs="*", default=(), help="only those of this name, or else that contain it"
    )
    parser.add_argument("--shipped", action="store_true", help="the pack's files, not the folder's")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    options = Options(**vars(parser.parse_args()))
    torch.set_flush_denormal(True)
    try:
        asked = report.asked([row.name for row in ROWS], options.rows)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    download(options.work / "sources")
    bench = make_bench(options)
    wanted = [row for row in ROWS if row.name in asked and bench.has(row.model)]
    missing = options.answers.missing(wanted, options.numbers, bench)
    try:
        if missing:
            run_shared(partial(measure, options, missing), options.processes)
    finally:  # also of what was measured until it was stopped
        write_table(options, bench)


if __name__ == "__main__":
    main()
