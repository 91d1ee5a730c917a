"""References without trained weights, measured: ``python -m lab.references``.

The base that ships was shown references while it was trained (docs/mini.md), so what it makes of
them says nothing about a base that never was, such as SDXL. The base of the third run was not:
9,600 steps on captions alone, at 128x128. It is in this repository's history, with the rest of that
day's model:

    mkdir DIR
    for part in unet vae clip_text clip_vision anystory; do
        git show 7c3acbd:anystory_core/mini/weights/$part.safetensors > DIR/$part.safetensors
    done
    python -m lab.references --weights DIR --work WORK --out OUT

Its base and CLIP branch are converted as a user's are (:mod:`.files.public`), and each row draws
the same held-out tasks with other references. Besides the finder's and the identity network's
answers an eye counts that was never near this world (:mod:`.measuring.eye`). It names the warmest
found place, or the picture where none is found, by the nearest of the 200 subjects' mean features
over real renders.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import anystory_core.mini.config as mini_config
from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.config import References
from anystory_core.weights.checkpoint import read_header

PICTURE_SIZE = 128  # of that run
_RENDERS = 5
_AT_ONCE = 40  # tasks of a row, before the next row's
SHARES = (
    "background right",
    "named right",
    "named right by the independent eye",
    "same pose as the reference",
)
COSINE = "cosine of the independent eye"


@dataclass(frozen=True)
class Row:
    """What a row draws with: the kind of reference net, and which references act, how strongly and
    up to which part of the sampling (only those of matched noise end)."""

    title: str
    references: References | None
    net: str = "simplified"
    strength: float = 1.0
    end: float = 1.0


ROWS = (
    Row("none", None),
    Row("whole, clean (t = 0)", "whole"),
    Row("masked", "masked"),
    Row("masked in the decoder", "masked in the decoder"),
    Row("matched noise", "matched noise"),
    Row("masked, matched noise", "masked, matched noise"),
    Row("whole, original net", "whole", "original"),
    Row("masked, original net", "masked", "original"),
    Row("masked, matched noise, strength 4", "masked, matched noise", strength=4.0),
    Row("masked, matched noise, to 0.8", "masked, matched noise", end=0.8),
)


def as_of_then(weights: Path) -> None:
    """Give the lab the sizes of the weights in a folder. Its modules take them from the mini
    configuration when they are imported, which must come after this."""
    config = read_header(weights / "anystory.safetensors").config
    assert isinstance(config, AnyStoryConfig)
    mini_config.CONFIG, mini_config.PICTURE_SIZE = config, PICTURE_SIZE


def summary(answers: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Each figure with its interval: shares of yes and no, means of other numbers."""
    from .evaluation import measures

    figures: dict[str, Any] = {}
    for name, given in answers.items():
        if name == COSINE:
            figures[name] = dataclasses.asdict(measures.bootstrap(given))
        elif given:
            figures[name] = dataclasses.asdict(measures.wilson(round(sum(given)), len(given)))
    return figures


def measure(
    weights: Path,
    work: Path,
    out: Path,
    rows: Sequence[Row],
    numbers: range,
    routes: Literal["single", "masks"],
    steps: int,
) -> None:
    """Draw and count the rows in turn, some tasks of each at a time, so that all have as many
    whenever this ends; what is in the table already is kept."""
    as_of_then(weights)
    from .evaluation import draw, judge, passes, stack, tasks
    from .files.public import converted
    from .measuring.eye import Eye
    from .measuring.identity import gallery
    from .world.emoji import download

    download(work / "sources")
    subjects = tasks.held_out_subjects(work / "sources")
    networks = stack.stack_of_files(weights)
    branch = stack.load_anystory(weights / "anystory.safetensors")
    models = converted(networks.unet, branch)
    judging, eye = judge.Judge.load(subjects), Eye()
    known = gallery(eye, subjects, judging.grounds, _RENDERS, 950_000_000)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"references_{routes}_{steps}.json"
    table: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def count(row: Row, part: range) -> dict[str, list[float]]:
        variant = draw.Variant(
            models[row.net],
            routes,
            reference=row.references is not None,
            references=row.references or "whole",
            reference_strength=row.strength,
            matched_end=row.end,
        )
        answers: dict[str, list[float]] = {name: [] for name in (*SHARES, COSINE)}
        for batch in passes.batches(subjects, 1, part):
            captions = [task.caption("plain") for task in batch]
            pictures = draw.draw(networks, batch, captions, variant, steps=steps)
            verdicts = judging.judge(pictures, batch)
            for picture, task, verdict in zip(pictures, batch, verdicts, strict=True):
                found, _ = judging.look(picture)
                crop = judge.cut(picture, found[0].box if found else (0.0, 0.0, 1.0, 1.0))
                near = eye(crop[None]) @ known.t()
                own = task.subjects[0]
                given = (verdict.place_right, verdict.best_right, int(near.argmax()) == own)
                for name, answer in zip(SHARES, given, strict=False):
                    answers[name].append(float(answer))
                if found:
                    answers[SHARES[-1]].append(float(judging.same_pose(crop, task)))
                answers[COSINE].append(float(near[0, own]))
        return answers

    for first in range(0, len(numbers), _AT_ONCE):
        part = numbers[first : first + _AT_ONCE]
        for row in rows:
            entry = table.setdefault(row.title, {"tasks": [], "answers": {}})
            if part[0] in entry["tasks"]:
                continue
            for name, given in count(row, part).items():
                entry["answers"].setdefault(name, []).extend(given)
            entry["tasks"].extend(part)
            entry["figures"] = summary(entry["answers"])
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(table) + "\n")
            os.replace(temporary, file)
            shown = ", ".join(
                f"{name} {100 * f['value']:.1f} ({100 * f['low']:.1f}-{100 * f['high']:.1f})"
                for name, f in entry["figures"].items()
            )
            print(f"{row.title}, {len(entry['tasks'])} tasks: {shown}", flush=True)


def main() -> None:
    """Parse the command line, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="that run's files")
    parser.add_argument("--work", type=Path, required=True, help="where the sources are or go")
    parser.add_argument("--out", type=Path, required=True, help="where the table goes")
    parser.add_argument("--samples", type=int, default=300, help="tasks of each row")
    parser.add_argument("--first", type=int, default=0, help="number of the first task")
    parser.add_argument("--rows", nargs="*", default=(), help="only rows with these titles")
    parser.add_argument(
        "--routes", choices=("single", "masks"), default="single", help="everywhere, or in a box"
    )
    parser.add_argument("--steps", type=int, default=25, help="of the sampling")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    rows = [row for row in ROWS if not given.rows or row.title in given.rows]
    numbers = range(given.first, given.first + given.samples)
    measure(given.weights, given.work, given.out, rows, numbers, given.routes, given.steps)


if __name__ == "__main__":
    main()
