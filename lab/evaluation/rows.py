"""The rows of the table: what is drawn with, what is asked for, and what is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from . import draw, measures
from .bench import WITHOUT_MODEL, Answer, Bench, Result, Row
from .draw import Variant
from .judge import Judge, Verdict
from .passes import scenes_of
from .routing import ROUTED
from .segmentation import SEGMENTED
from .tasks import Task


@dataclass(frozen=True)
class Drawn:
    """A row of drawn pictures. ``model``: "full", "no clip", "no reference", "base", or "converted
    simplified", "converted original" and "converted none", made without training
    (:mod:`..files.public`); "real" shows the measuring networks the scenes themselves. "plain"
    captions say "an object" for every name. ``agree`` as in :class:`~.draw.Variant`. ``trained``:
    of subjects that everything was trained on (:func:`~.tasks.training_subjects`), in scenes of
    their own."""

    title: str
    count: int
    model: str = "full"
    captions: Literal["plain", "named"] = "plain"
    routes: draw.Routes = "router"
    clip: bool = True
    reference: bool = True
    agree: bool = True
    trained: bool = False

    @property
    def name(self) -> str:
        """What the table calls it: 2 subjects: full."""
        return f"{self.count} subject{'s' * (self.count > 1)}: {self.title}"

    @property
    def counts(self) -> tuple[int, ...]:
        """Its number of subjects."""
        return (self.count,)

    def judge(self, bench: Bench) -> Judge:
        """Of training subjects, or of held-out ones."""
        return bench.trained if self.trained else bench.judge

    def answers(self, bench: Bench, tasks: Sequence[Task]) -> list[Answer]:
        """What the measuring networks say of a picture of each task."""
        if self.model == "real":
            pictures = scenes_of(tasks)
        else:
            # The words of a task's subjects are its own.
            size = 1 if self.routes == "text" else len(tasks)
            parts = [tasks[start : start + size] for start in range(0, len(tasks), size)]
            model = None if self.model in WITHOUT_MODEL else bench.model(self.model)
            variant = Variant(model, self.routes, self.clip, self.reference, self.agree)
            pictures = torch.cat(
                [
                    draw.draw(bench.stack, part, [t.caption(self.captions) for t in part], variant)
                    for part in parts
                ]
            )
        bench.keep(self.name, tasks, pictures)
        return [dataclasses.asdict(v) for v in self.judge(bench).judge(pictures, tasks)]

    def figures(self, answers: Sequence[Answer]) -> Result:
        """Shares and means with their intervals."""
        return counted([Verdict(**answer) for answer in answers], self.count)


DRAWN = (
    *(Drawn("real pictures", count, "real") for count in (1, 2, 3)),
    Drawn("full", 1),
    Drawn("full, subject's name in the caption", 1, captions="named"),
    Drawn("full, routed everywhere", 1, routes="single"),
    Drawn("trained without ReferenceNet", 1, "no reference", routes="single"),
    Drawn("trained without CLIP", 1, "no clip", routes="single"),
    Drawn("ReferenceNet removed", 1, routes="single", reference=False),
    Drawn("CLIP removed", 1, routes="single", clip=False),
    Drawn("base alone", 1, "base"),
    Drawn("real pictures, training subjects", 1, "real", trained=True),
    Drawn("full, training subjects", 1, trained=True),
    Drawn("base alone, training subjects named", 1, "base", "named", trained=True),
    Drawn("full", 2),
    Drawn("full, subjects' names in the caption", 2, captions="named"),
    Drawn("each block for itself", 2, agree=False),
    Drawn("without router", 2, routes="merged"),
    Drawn("user masks", 2, routes="masks"),
    Drawn("full", 3),
    Drawn("without router", 3, routes="merged"),
    Drawn("user masks", 3, routes="masks"),
    *(
        row
        for title, model in (
            ("converted, simplified net", "converted simplified"),
            ("converted, original net", "converted original"),
            ("converted, no references", "converted none"),
        )
        for row in (
            Drawn(title, 1, model, routes="single"),
            Drawn(f"{title}, user masks", 2, model, routes="masks"),
            Drawn(f"{title}, names in the caption, by words", 2, model, "named", "text"),
        )
    ),
)


def counted(verdicts: Sequence[Verdict], subjects: int) -> Result:
    """Shares with their intervals."""

    def share(answers: Sequence[bool]) -> measures.Estimate:
        return measures.wilson(sum(answers), len(answers))

    result: Result = {"background right": share([v.place_right for v in verdicts])}
    if subjects == 1:
        result["identity top-1"] = share([v.best_right for v in verdicts])
        seen = [v.eye_right for v in verdicts if v.eye_right is not None]
        result["ImageNet's eye, top-1"] = share(seen)
        pairs = [(v.outline, v.other_outline) for v in verdicts]
        result["outline"] = measures.bootstrap([own for own, _ in pairs if own is not None])
        both = [(own, other) for own, other in pairs if own is not None and other is not None]
        if both:
            result["outline of another subject"] = measures.bootstrap([other for _, other in both])
            difference = measures.bootstrap([own - other for own, other in both])
            result["outline, own less another's"] = difference
        poses = [v.same_pose for v in verdicts if v.same_pose is not None]
        if poses:
            result["same pose as the reference"] = share(poses)
    else:
        result["all right"] = share([v.all_right for v in verdicts])
        found = [v for v in verdicts if v.names]
        if found:
            result["blended"] = share([v.blended for v in found])
    return result


ROWS: tuple[Row, ...] = (*DRAWN, *ROUTED, *SEGMENTED)
