"""The rows of the table: what is drawn with, what is asked for, and what is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anystory_core.routing.segment import mean_maps
from anystory_core.training.call import TrainingCall
from anystory_core.training.losses import target_maps
from anystory_core.weights.model import AnyStoryModel

from ..world.emoji import Emoji
from . import draw, measures
from .draw import SIDE, Encoder, Variant, prepare_tasks
from .judge import Judge, Verdict
from .passes import BATCH, batches, clean_latents, half_of, level_record, noised_pass, scenes_of
from .stack import Stack
from .tasks import Task

LEVELS = (200, 500, 800)  # of 1000
WITHOUT_MODEL = ("base", "real")  # values of Drawn.model that name no AnyStory weights

Result = dict[str, measures.Estimate]
Keep = Callable[[Sequence[Task], Tensor], None]


@dataclass(frozen=True)
class Drawn:
    """A row of drawn pictures. ``model``: "full", "no clip", "no reference", "base", or "converted
    simplified", "converted original" and "converted none", made without training
    (:mod:`..files.public`); "real" shows the measuring networks the scenes themselves. "plain"
    captions say "an object" for every name. ``agree`` as in :class:`~.draw.Variant`. ``trained``:
    of subjects that everything was trained on (:func:`~.tasks.training_subjects`), in scenes of
    their own."""

    title: str
    subjects: int
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
        return f"{self.subjects} subject{'s' * (self.subjects > 1)}: {self.title}"


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


def measure_drawn(
    row: Drawn,
    models: dict[str, AnyStoryModel],
    stack: Stack,
    judge: Judge,
    numbers: range,
    keep: Keep | None = None,
) -> Result:
    """Draw the tasks of these numbers and count. KeyError names a model that is not there."""
    model = None if row.model in WITHOUT_MODEL else models[row.model]
    routes = row.routes if model is None or model.routers is not None else _without(row.routes)
    variant = Variant(model, routes, row.clip, row.reference, row.agree)
    verdicts: list[Verdict] = []
    size = 1 if routes == "text" else BATCH
    for tasks in batches(judge.subjects, row.subjects, numbers, size):
        if row.model == "real":
            pictures = scenes_of(tasks)
        else:
            pictures = draw.draw(stack, tasks, [t.caption(row.captions) for t in tasks], variant)
        if keep is not None:
            keep(tasks, pictures)
        verdicts += judge.judge(pictures, tasks)
    return counted(verdicts, row.subjects)


def _without(routes: draw.Routes) -> draw.Routes:
    return "single" if routes == "router" else routes


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


@dataclass
class _Routing:
    """IoU sums of one noise level."""

    layers: dict[int, list[float]] = dataclasses.field(default_factory=dict[int, list[float]])
    coarse_layers: dict[int, list[float]] = dataclasses.field(
        default_factory=dict[int, list[float]]
    )
    over: list[float] = dataclasses.field(default_factory=list[float])
    coarse_over: list[float] = dataclasses.field(default_factory=list[float])
    perfect_over: list[float] = dataclasses.field(default_factory=list[float])
    ceiling: list[float] = dataclasses.field(default_factory=list[float])


def _pass_of(
    encoder: Encoder, tasks: Sequence[Task], level: int, routes: draw.Routes
) -> TrainingCall:
    """One pass over the tasks' scenes, noised to ``level``, with their captions."""
    noise = torch.stack([t.noise((4, SIDE, SIDE), salt=level) for t in tasks])
    text = encoder.stack.encode_text([t.caption("named") for t in tasks])
    prepared = prepare_tasks(Variant(encoder.model, routes, agree=False), encoder, tasks)
    return noised_pass(encoder, prepared, clean_latents(encoder, tasks), noise, level, text)


def measure_routing(
    model: AnyStoryModel, stack: Stack, subjects: Sequence[Emoji], numbers: range, level: int
) -> Result:
    """Real held-out scenes of two and three subjects, noised to ``level``: IoU of the routes with
    the true masks."""
    sums = _Routing()
    encoder = Encoder(stack, model)
    for count in (2, 3):
        for tasks in batches(subjects, count, half_of(numbers)):
            call = _pass_of(encoder, tasks, level, "router")
            for row, one in enumerate(tasks):
                _add(sums, call, row, one)
    result = {
        "over layers": measures.bootstrap(sums.over),
        "over layers, coarse": measures.bootstrap(sums.coarse_over),
        "over layers, each block's map perfect": measures.bootstrap(sums.perfect_over),
        "perfect masks": measures.bootstrap(sums.ceiling),
    }
    for index in sorted(sums.layers):
        result[f"layer {index}"] = measures.bootstrap(sums.layers[index])
        result[f"layer {index}, coarse"] = measures.bootstrap(sums.coarse_layers[index])
    return result


def measure_text_routing(
    model: AnyStoryModel, stack: Stack, subjects: Sequence[Emoji], numbers: range, level: int
) -> Result:
    """IoU with the true masks of the routes that the labels' words give
    (:mod:`anystory_core.routing.words`), label = name, on the scenes of :func:`measure_routing`; no
    router takes part. One scene at a time, because its words are its own."""
    over: list[float] = []
    ceilings: list[float] = []
    encoder = Encoder(stack, model)
    for count in (2, 3):
        for (one,) in batches(subjects, count, half_of(numbers), 1):
            record = level_record(_pass_of(encoder, [one], level, "text"), 0)
            true = one.masks()
            over.append(measures.picture_iou(mean_maps(record, (SIDE, SIDE)), true))
            ceilings.append(measures.mean_ceiling(true, (SIDE, SIDE)))
    return {
        "over layers": measures.bootstrap(over),
        "perfect masks": measures.bootstrap(ceilings),
    }


def _add(sums: _Routing, call: TrainingCall, row: int, one: Task) -> None:
    true = one.masks()
    refined = level_record(call, row)
    coarse: dict[int, Tensor] = {}
    for index, soft in call.soft_maps.items():
        assert soft.logits is not None
        coarse[index] = soft.logits.coarse[row : row + 1].float().softmax(dim=1)
        for store, maps in ((sums.layers, refined.soft), (sums.coarse_layers, coarse)):
            value = measures.grid_iou(maps[index][0], true, soft.grid)
            store.setdefault(index, []).append(value)
    perfect = {index: target_maps(true[None], grid) for index, grid in refined.grids.items()}
    for store, maps in (
        (sums.over, refined.soft), (sums.coarse_over, coarse), (sums.perfect_over, perfect),
    ):  # fmt: skip
        mean = mean_maps(dataclasses.replace(refined, soft=maps), (SIDE, SIDE))
        store.append(measures.picture_iou(mean, true))
    sums.ceiling.append(measures.mean_ceiling(true, (SIDE, SIDE)))
