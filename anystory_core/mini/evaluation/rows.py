"""The rows of the table: what is drawn with, what is asked for, and what is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...build import AnyStoryModel
from ...conditioner import Call
from ...routing_maps import StepRecord
from ...segment import mean_maps
from ...training import diffusers_unet
from ...training.bases import alphas_cumprod
from ..base import size_ids
from ..emoji import Emoji
from ..phase import autocast
from ..vae import to_signed
from . import draw, measures
from .draw import SIDE, Encoder, Variant, make_call, make_run
from .judge import Judge, Verdict
from .stack import Stack
from .tasks import Task, task

BATCH = 20
LEVELS = (200, 500, 800)  # of 1000

Result = dict[str, measures.Estimate]
Keep = Callable[[Sequence[Task], Tensor], None]


@dataclass(frozen=True)
class Drawn:
    """A row of drawn pictures. ``model``: "full", "no clip", "no reference", "base", or "converted
    simplified", "converted original" and "converted none", made without training
    (:mod:`..public`); "plain" captions say "an object" for every name."""

    title: str
    subjects: int
    model: str = "full"
    captions: Literal["plain", "named"] = "plain"
    routes: draw.Routes = "router"
    clip: bool = True
    reference: bool = True


DRAWN = (
    Drawn("full", 1),
    Drawn("full, subject's name in the caption", 1, captions="named"),
    Drawn("full, routed everywhere", 1, routes="single"),
    Drawn("trained without ReferenceNet", 1, "no reference", routes="single"),
    Drawn("trained without CLIP", 1, "no clip", routes="single"),
    Drawn("ReferenceNet removed", 1, routes="single", reference=False),
    Drawn("CLIP removed", 1, routes="single", clip=False),
    Drawn("base alone", 1, "base"),
    Drawn("full", 2),
    Drawn("full, subjects' names in the caption", 2, captions="named"),
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
    samples: int,
    keep: Keep | None = None,
) -> Result:
    """Draw ``samples`` tasks and count. KeyError names a model that is not there."""
    model = None if row.model == "base" else models[row.model]
    routes = row.routes if model is None or model.routers is not None else _without(row.routes)
    variant = Variant(model, routes, row.clip, row.reference)
    verdicts: list[Verdict] = []
    size = 1 if routes == "text" else BATCH
    for tasks in _batches(judge.subjects, row.subjects, samples, size):
        captions = [t.caption(row.captions) for t in tasks]
        pictures = draw.draw(stack, tasks, captions, variant)
        if keep is not None:
            keep(tasks, pictures)
        verdicts += judge.judge(pictures, tasks)
    return counted(verdicts, row.subjects)


def _without(routes: draw.Routes) -> draw.Routes:
    return "single" if routes == "router" else routes


def _batches(
    subjects: Sequence[Emoji], count: int, samples: int, size: int = BATCH
) -> list[list[Task]]:
    numbers = range(samples)
    return [
        [task(subjects, count, n) for n in numbers[start : start + size]]
        for start in range(0, samples, size)
    ]


def counted(verdicts: Sequence[Verdict], subjects: int) -> Result:
    """Shares with their intervals."""

    def share(answers: Sequence[bool]) -> measures.Estimate:
        return measures.wilson(sum(answers), len(answers))

    result: Result = {"background right": share([v.place_right for v in verdicts])}
    if subjects == 1:
        result["identity top-1"] = share([v.best_right for v in verdicts])
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

    layers: dict[int, list[float]]
    coarse_layers: dict[int, list[float]]
    over: list[float]
    coarse_over: list[float]
    ceiling: list[float]


@torch.no_grad()
def _look(
    encoder: Encoder, tasks: Sequence[Task], level: int, routes: draw.Routes = "router"
) -> Call:
    """One conditional pass over the tasks' scenes noised to ``level``, their captions and
    injection on: the call, with its maps."""
    stack, model, count = encoder.stack, encoder.model, len(tasks)
    text, pooled = stack.encode_text([t.caption("named") for t in tasks])
    pictures = torch.stack([torch.from_numpy(t.scene.picture.copy()) for t in tasks])
    clean = stack.encode_pictures(to_signed(pictures))
    noise = torch.stack([t.noise((4, SIDE, SIDE), salt=level) for t in tasks])
    alpha = alphas_cumprod().float()[level]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    call = make_call(make_run(Variant(model, routes), encoder, tasks), model, count)
    with autocast():
        diffusers_unet.predict(
            stack.unet, stack.slot, call, noisy, torch.full((count,), level), text, pooled,
            size_ids(count),
        )  # fmt: skip
    return call


def measure_routing(
    model: AnyStoryModel, stack: Stack, subjects: Sequence[Emoji], samples: int, level: int
) -> Result:
    """Real held-out scenes of two and three subjects, noised to ``level``: IoU of the routes with
    the true masks."""
    sums = _Routing({}, {}, [], [], [])
    encoder = Encoder(stack, model)
    for count in (2, 3):
        for tasks in _batches(subjects, count, samples // 2):
            call = _look(encoder, tasks, level)
            for row, one in enumerate(tasks):
                _add(sums, call, row, one)
    result = {
        "over layers": measures.bootstrap(sums.over),
        "over layers, coarse": measures.bootstrap(sums.coarse_over),
        "perfect masks": measures.bootstrap(sums.ceiling),
    }
    for index in sorted(sums.layers):
        result[f"layer {index}"] = measures.bootstrap(sums.layers[index])
        result[f"layer {index}, coarse"] = measures.bootstrap(sums.coarse_layers[index])
    return result


def measure_text_routing(
    model: AnyStoryModel, stack: Stack, subjects: Sequence[Emoji], samples: int, level: int
) -> Result:
    """The same scenes with the routes of the labels' words (:mod:`...text_routes`), label = name;
    no router takes part. One scene at a time, because its words are its own."""
    over: list[float] = []
    ceilings: list[float] = []
    encoder = Encoder(stack, model)
    for count in (2, 3):
        for (one,) in _batches(subjects, count, samples // 2, 1):
            call = _look(encoder, [one], level, "text")
            maps = {index: soft.maps.float() for index, soft in call.soft_maps.items()}
            grids = {index: soft.grid for index, soft in call.soft_maps.items()}
            true = one.masks()
            mean = mean_maps(_step(maps, grids), (SIDE, SIDE))
            over.append(measures.picture_iou(mean, true))
            ceilings.append(measures.mean_ceiling(true, (SIDE, SIDE)))
    return {
        "over layers": measures.bootstrap(over),
        "perfect masks": measures.bootstrap(ceilings),
    }


def _add(sums: _Routing, call: Any, row: int, one: Task) -> None:
    true = one.masks()
    refined: dict[int, Tensor] = {}
    coarse: dict[int, Tensor] = {}
    grids: dict[int, tuple[int, int]] = {}
    for index, soft in call.soft_maps.items():
        grids[index] = soft.grid
        refined[index] = soft.maps[row : row + 1].float()
        coarse[index] = soft.logits.coarse[row : row + 1].float().softmax(dim=1)
        for store, maps in ((sums.layers, refined), (sums.coarse_layers, coarse)):
            value = measures.grid_iou(maps[index][0], true, soft.grid)
            store.setdefault(index, []).append(value)
    for store, maps in ((sums.over, refined), (sums.coarse_over, coarse)):
        mean = mean_maps(_step(maps, grids), (SIDE, SIDE))
        store.append(measures.picture_iou(mean, true))
    sums.ceiling.append(measures.mean_ceiling(true, (SIDE, SIDE)))


def _step(maps: dict[int, Tensor], grids: dict[int, tuple[int, int]]) -> StepRecord:
    return StepRecord(sigma=0.0, active=(), grids=grids, soft=maps)
