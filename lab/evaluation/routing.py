"""Routes on real held-out scenes that are noised to a level: IoU with the true masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from anystory_core.routing.record import LevelRecord
from anystory_core.routing.segment import mean_maps
from anystory_core.training.call import TrainingCall
from anystory_core.training.losses import target_maps
from anystory_core.weights.model import AnyStoryModel

from . import draw, measures
from .bench import Answer, Bench, Result
from .draw import SIDE, Encoder, Variant, prepare_tasks
from .judge import Judge
from .passes import clean_latents, level_record, noised_pass
from .stack import Stack
from .tasks import Task

LEVELS = (200, 500, 800)  # of 1000


def _pass_of(
    encoder: Encoder, tasks: Sequence[Task], level: int, routes: draw.Routes
) -> TrainingCall:
    """One pass over the tasks' scenes, noised to ``level``, with their captions."""
    noise = torch.stack([t.noise((4, SIDE, SIDE), salt=level) for t in tasks])
    text = encoder.stack.encode_text([t.caption("named") for t in tasks])
    prepared = prepare_tasks(Variant(encoder.model, routes, agree=False), encoder, tasks)
    return noised_pass(encoder, prepared, clean_latents(encoder, tasks), noise, level, text)


def routing(model: AnyStoryModel, stack: Stack, tasks: Sequence[Task], level: int) -> list[Answer]:
    """What the router answers of each scene: over layers, what perfect masks reach on the latent's
    grid, and block by block; refined and coarse."""
    call = _pass_of(Encoder(stack, model), tasks, level, "router")
    return [_overlaps(call, row, one.masks()) for row, one in enumerate(tasks)]


def text_routing(
    model: AnyStoryModel, stack: Stack, tasks: Sequence[Task], level: int
) -> list[Answer]:
    """What the labels' words give (:mod:`anystory_core.routing.words`), label = name; no router
    takes part. One scene at a time, because its words are its own."""
    encoder = Encoder(stack, model)
    out: list[Answer] = []
    for one in tasks:
        record, true = level_record(_pass_of(encoder, [one], level, "text"), 0), one.masks()
        out.append({"over layers": _over(record, true), **_perfect(true)})
    return out


def _over(record: LevelRecord, true: Tensor) -> float:
    return measures.picture_iou(mean_maps(record, (SIDE, SIDE)), true)


def _perfect(true: Tensor) -> Answer:
    return {"perfect masks": measures.mean_ceiling(true, (SIDE, SIDE))}


def _overlaps(call: TrainingCall, row: int, true: Tensor) -> Answer:
    refined = level_record(call, row)
    coarse: dict[int, Tensor] = {}
    layers: Answer = {}
    for index, soft in sorted(call.soft_maps.items()):
        assert soft.logits is not None
        coarse[index] = soft.logits.coarse[row : row + 1].float().softmax(dim=1)
        layers[f"layer {index}"] = measures.grid_iou(refined.soft[index][0], true, soft.grid)
        layers[f"layer {index}, coarse"] = measures.grid_iou(coarse[index][0], true, soft.grid)
    perfect = {index: target_maps(true[None], grid) for index, grid in refined.grids.items()}
    return {
        "over layers": _over(refined, true),
        "over layers, coarse": _over(dataclasses.replace(refined, soft=coarse), true),
        "over layers, each block's map perfect": _over(
            dataclasses.replace(refined, soft=perfect), true
        ),
        **_perfect(true),
        **layers,
    }


def means(answers: Sequence[Answer]) -> Result:
    """The mean of each number that the answers hold."""
    return {name: measures.bootstrap([a[name] for a in answers]) for name in answers[0]}


@dataclass(frozen=True)
class Scenes:
    """A row of real scenes of two and of three held-out subjects, which ``measure`` (model, stack,
    tasks) answers of."""

    name: str
    measure: Callable[[AnyStoryModel, Stack, Sequence[Task]], list[Answer]]
    model: str = "full"
    counts: tuple[int, ...] = (2, 3)

    def judge(self, bench: Bench) -> Judge:
        """Of held-out subjects."""
        return bench.judge

    def answers(self, bench: Bench, tasks: Sequence[Task]) -> list[Answer]:
        """Of each scene. ValueError when the model holds no router and is asked for it."""
        model = bench.model(self.model)
        assert model is not None
        return self.measure(model, bench.stack, tasks)

    def figures(self, answers: Sequence[Answer]) -> Result:
        """The mean of each number that the answers hold."""
        return means(answers)


ROUTED = tuple(
    Scenes(f"routing at {level}: {title}", partial(measure, level=level), model)
    for title, measure, model in (
        ("full", routing, "full"),
        ("trained without refinement", routing, "no refinement"),
        ("by the labels' words", text_routing, "full"),
    )
    for level in LEVELS
)
