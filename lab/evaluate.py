"""The paper's claims as numbers on the mini model: ``python -m lab.evaluate``.

Draws held-out subjects in held-out scenes, row by row, and writes ``evaluation.json``,
``evaluation.md`` and a sheet of pictures per row to ``--out``. The sources are fetched into the
recipe's folder when they are missing there; the measuring networks are those of the repository
(:mod:`.measuring.networks`), whatever is measured. What the rows are: :mod:`.evaluation.rows`.
What was chosen by looking at the first tasks is measured on others, from ``--first`` on. A row that
is done with the same weights and tasks is not drawn again; a row whose weights were never trained
is left out of the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anystory_core.mini.config import PICTURE_SIZE
from anystory_core.mini.weights import FOLDER
from anystory_core.mini.weights import path as weights_path
from anystory_core.weights.fingerprint import weights_fingerprint
from anystory_core.weights.model import AnyStoryModel

from .evaluation import report, rows, segmentation
from .evaluation.judge import Judge
from .evaluation.stack import Stack, load_anystory, stack_of_files, stack_of_work
from .evaluation.tasks import held_out_subjects, training_subjects
from .files.public import converted
from .stages import WHOLE_FILE
from .world.emoji import Emoji, download

ROUTING_SAMPLES = 500
CONVERTED = "converted "  # begins the names of models that are made without training


def find_models(work: Path, *, shipped: bool) -> dict[str, AnyStoryModel]:
    """The trained models that are there: "full" and the ablations."""
    files = {
        "full": weights_path("anystory") if shipped else work / WHOLE_FILE,
        "no clip": work / "no_clip" / "anystory_subject.safetensors",
        "no reference": work / "no_reference" / "anystory_subject.safetensors",
        "no refinement": work / "no_refinement" / WHOLE_FILE.name,
    }
    return {name: load_anystory(file) for name, file in files.items() if file.exists()}


def convert_models(stack: Stack, models: dict[str, AnyStoryModel]) -> dict[str, AnyStoryModel]:
    """What a user gets without training: the base converted with the CLIP branch that was trained
    without a ReferenceNet, as IP-Adapter is, or else with the full model's."""
    branch = models.get("no reference", models.get("full"))
    if branch is None:
        return {}
    return {f"{CONVERTED}{kind}": made for kind, made in converted(stack.unet, branch).items()}


class Table:
    """``evaluation.json``: finished rows by name."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.file = folder, folder / "evaluation.json"
        self.rows: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            saved = json.loads(self.file.read_text())
            if saved["weights"] == key:
                self.rows = saved["rows"]
        self.key = key

    def add(self, name: str, samples: int, measure: Callable[[], rows.Result]) -> None:
        """Measure a row unless it is there with as many samples; write all rows anew."""
        if self.rows.get(name, {}).get("samples") == samples:
            return
        start = time.monotonic()
        result = {key: dataclasses.asdict(value) for key, value in measure().items()}
        self.rows[name] = {
            "samples": samples, "seconds": round(time.monotonic() - start), "figures": result,
        }  # fmt: skip
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"weights": self.key, "rows": self.rows}, indent=1) + "\n")
        os.replace(temporary, self.file)
        (self.folder / "evaluation.md").write_text(report.markdown(self.rows))
        print(report.line(name, self.rows[name]), flush=True)


def measure_all(
    stack: Stack,
    models: dict[str, AnyStoryModel],
    subjects: Sequence[Emoji],
    judge: Judge,
    trained: Judge,
    table: Table,
    numbers: range,
    wanted: Sequence[str],
) -> None:
    """Every row that ``wanted`` names, or all, of the tasks with these numbers; rows of models that
    are not there are left out. ``trained`` judges the rows of training subjects."""
    known = dict(models)
    for row in rows.DRAWN:
        name = row.name
        if not report.asked(name, wanted):
            continue
        if row.model.startswith(CONVERTED) and row.model not in known:
            known.update(convert_models(stack, models))
        if row.model not in (*rows.WITHOUT_MODEL, *known):
            continue
        sheet = report.Sheet(table.folder / f"{report.slug(name)}.jpg")

        def draw(row: rows.Drawn = row, sheet: report.Sheet = sheet) -> rows.Result:
            named_by = trained if row.trained else judge
            return rows.measure_drawn(row, known, stack, named_by, numbers, sheet.keep)

        table.add(name, len(numbers), draw)
    scenes = numbers[:ROUTING_SAMPLES]
    measures = {
        "full": rows.measure_routing,
        "trained without refinement": rows.measure_routing,
        "by the labels' words": rows.measure_text_routing,
    }
    kinds = {"trained without refinement": "no refinement"}
    for title, measure in measures.items():
        model = models.get(kinds.get(title, "full"))
        for level in rows.LEVELS:
            name = f"routing at {level}: {title}"
            if model is None or not report.asked(name, wanted):
                continue
            if model.routers is None and measure is rows.measure_routing:
                continue
            table.add(name, len(scenes), partial(measure, model, stack, subjects, scenes, level))
    full = models.get("full")
    for name, noises in segmentation.ROWS.items():
        if full is not None and full.routers is not None and report.asked(name, wanted):
            measure_masks = partial(segmentation.measure_segmentation, full, stack, subjects)
            table.add(name, len(scenes), partial(measure_masks, scenes, noises))


def main() -> None:
    """Parse the command line, load everything, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the recipe's folder")
    parser.add_argument("--out", type=Path, required=True, help="where table and sheets go")
    parser.add_argument("--samples", type=int, default=500, help="of each row")
    parser.add_argument("--first", type=int, default=0, help="number of the first task")
    parser.add_argument("--rows", nargs="*", default=(), help="only rows whose names contain one")
    parser.add_argument("--shipped", action="store_true", help="the pack's files, not the folder's")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    download(given.work / "sources")
    subjects = held_out_subjects(given.work / "sources")
    stack = stack_of_files(FOLDER) if given.shipped else stack_of_work(given.work)
    models = find_models(given.work, shipped=given.shipped)
    judge = Judge.load(subjects)
    eyes = weights_fingerprint(judge.finder, judge.identity, judge.segmenter)
    made = [model.fingerprint for model in models.values()]
    key = "-".join((str(PICTURE_SIZE), stack.fingerprint, *made, eyes, str(given.first)))
    table = Table(given.out, key)
    numbers = range(given.first, given.first + given.samples)
    trained = dataclasses.replace(judge, subjects=tuple(training_subjects(given.work / "sources")))
    measure_all(stack, models, subjects, judge, trained, table, numbers, given.rows)


if __name__ == "__main__":
    main()
