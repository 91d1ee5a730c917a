"""Pictures of tasks, several at once: references encoded as in the nodes, then deterministic DDIM
with classifier-free guidance.

A :class:`Variant` says which parts of the method take part. Tasks of one batch have equally many
subjects; every row has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from anystory_core.config import References
from anystory_core.injection.call import Shown
from anystory_core.injection.matched import ReferenceInputs, ReferencePass
from anystory_core.injection.prepare import (
    PreparedSubjects,
    Settings,
    prepare_subjects,
    project,
)
from anystory_core.injection.rows import Rows
from anystory_core.mini.config import CONFIG, PICTURE_SIZE
from anystory_core.routing.agreement import BLANK
from anystory_core.routing.sources import LearnedRoutes, RouteSource, SingleRoute
from anystory_core.routing.words import TextRoutes
from anystory_core.subject.encoder import PictureStates, encode_subject
from anystory_core.subject.preprocess import prepare_views, zero_clip
from anystory_core.subject.subject import Subject
from anystory_core.training.call import TrainingCall
from anystory_core.training.hosts import unet as diffusers_unet
from anystory_core.training.schedule import ddim
from anystory_core.weights.model import AnyStoryModel

from ..networks.base import size_ids
from ..networks.row_sources import OwnPlaces, RowSources
from ..phase import autocast
from .stack import Stack
from .tasks import Task

STEPS = 25
GUIDANCE = 5.0
SIDE = PICTURE_SIZE // 8

Routes = Literal["router", "masks", "merged", "single", "text"]


@dataclass(frozen=True)
class Variant:
    """What is drawn with. ``model`` None: the base alone. ``routes``: "merged" is the method
    without a router, where every token attends to the tokens of all subjects; "text" goes by the
    words of the subjects' names, which are one task's own, so tasks are then drawn one by one.
    ``agree``: of "router", the blocks decide together who is where
    (:mod:`anystory_core.routing.agreement`). ``references``: which act, and how strongly, in tasks
    of one subject by the routes "single" and "masks"; None: all features.
    ``matched_end``: part of the sampling up to which those of matched noise act."""

    model: AnyStoryModel | None
    routes: Routes = "single"
    clip: bool = True
    reference: bool = True
    agree: bool = True
    references: References | None = None
    reference_strength: float = 1.0
    matched_end: float = 1.0


@dataclass
class Encoder:
    """Encodes references with one model; the background's CLIP states are made once."""

    stack: Stack
    model: AnyStoryModel
    _background: Tensor | None = field(default=None, repr=False)

    @torch.no_grad()
    def subjects(self, task: Task) -> list[Subject]:
        """One per reference of the task."""
        if self._background is None:
            self._background = self.stack.clip_states(zero_clip(CONFIG))
        out: list[Subject] = []
        for number, (picture, mask) in enumerate(task.references):
            image = torch.from_numpy(picture.copy()).float()[None] / 255
            views = prepare_views(image, torch.from_numpy(mask)[None].float(), CONFIG)
            model = self.model
            states = None if model.encoder.subject is None else self.stack.clip_states(views.clip)
            label = task.names()[number]
            context, pooled = self.stack.encode_text([label])
            seen = PictureStates(
                clip=states,
                background=None if states is None else self._background,
                latents=self.stack.encode_pictures(views.vae),
                label=context,
                pooled=pooled[0],
            )
            out.append(encode_subject(model, views, seen, label=label))
        return out


def prepare_tasks(variant: Variant, encoder: Encoder, tasks: Sequence[Task]) -> PreparedSubjects:
    """Keys and values of a batch, a row per task."""
    model = encoder.model
    encoded = [encoder.subjects(task) for task in tasks]
    if variant.references is not None:
        # Their numbers differ from task to task: each is a candidate of its own, for its row.
        own = [row[0] for row in encoded]
        whole = torch.ones(len(own), PICTURE_SIZE, PICTURE_SIZE)
        boxes = variant.routes == "masks"
        places = torch.stack([task.boxes()[0] for task in tasks]) if boxes else whole
        settings = Settings(
            strength=float(variant.clip),
            reference_strength=variant.reference_strength * variant.reference,
            references=variant.references,
            matched_end=variant.matched_end,
        )
        return prepare_subjects(model, own, OwnPlaces(places), settings)
    places = range(len(encoded[0]))
    tokens: list[Tensor | None] = [
        _stack([row[i].tokens for row in encoded]) if variant.clip else None for i in places
    ]
    features: list[tuple[Tensor, ...] | None] = [
        _layers([row[i].features for row in encoded]) if variant.reference else None for i in places
    ]
    if variant.routes == "merged":
        tokens, features = [_joined(tokens)], [_joined_layers(features)]
    ground = encoded[0][0].background_tokens if variant.clip else None
    tokens.append(None if ground is None else ground[None])
    conditions = project(model.projections, model.sites, tokens, [*features, None])
    count = len(features)
    biases = tuple(0.0 if f else -math.inf for f in features)
    return PreparedSubjects(
        conditions,
        _source(variant, encoder, encoded, tasks),
        (1.0,) * (count + 1),
        (*biases, -math.inf),
        agree=variant.agree and variant.routes == "router",
    )


def _stack(rows: Sequence[Tensor | None]) -> Tensor | None:
    return torch.stack([r for r in rows if r is not None]) if rows[0] is not None else None


def _layers(rows: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...] | None:
    return tuple(torch.stack(layer) for layer in zip(*rows, strict=True)) or None


def _joined(tokens: Sequence[Tensor | None]) -> Tensor | None:
    there = [t for t in tokens if t is not None]
    return torch.cat(there, dim=1) if there else None


def _joined_layers(features: Sequence[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
    there = [f for f in features if f]
    return tuple(torch.cat(layer, dim=1) for layer in zip(*there, strict=True)) or None


def _source(
    variant: Variant,
    encoder: Encoder,
    encoded: Sequence[Sequence[Subject]],
    tasks: Sequence[Task],
) -> RouteSource | TextRoutes:
    model = encoder.model
    if variant.routes == "masks":
        return RowSources.of_masks(task.boxes() for task in tasks)
    if variant.routes == "text":
        (one,) = tasks
        return TextRoutes(encoder.stack.texts(one.names()), model.sites)
    if variant.routes != "router":
        return SingleRoute()
    if model.routers is None:
        raise ValueError("routes 'router': the model holds no router")
    rows: list[Tensor] = []
    for row in encoded:
        features = [*(s.routing for s in row), row[0].background_routing]
        rows.append(torch.stack([f for f in features if f is not None]))
    return LearnedRoutes.prepare(model.routers, torch.stack(rows))


def make_call(
    prepared: PreparedSubjects,
    model: AnyStoryModel,
    cond: int,
    uncond: int = 0,
    *,
    blank: bool = False,
) -> TrainingCall:
    """A forward pass over ``cond`` conditional rows, then ``uncond`` unconditional ones. ``blank``
    as in :class:`~anystory_core.injection.call.Shown`."""
    rows = Rows(tuple(range(cond)), tuple(range(cond, cond + uncond)))
    active = (True,) * prepared.subjects
    attention = diffusers_unet.dense_attention
    return TrainingCall(prepared, rows, active, model.sites, attention, Shown(blank=blank))


def done(stack: Stack, t: int) -> float:
    """How much of the schedule lies before timestep ``t``, 0 to 1."""
    return 1 - t / (len(stack.schedule) - 1)


def read_references(stack: Stack, prepared: PreparedSubjects, t: int) -> PreparedSubjects:
    """``prepared`` with its references of timestep ``t``, where they are read at each."""
    matched, schedule = prepared.matched, stack.schedule
    if matched is None or not matched.start <= done(stack, t) <= matched.end:
        return prepared

    def forward(given: ReferenceInputs, reading: ReferencePass) -> None:
        times = torch.full((len(given.latents),), t)
        noisy = schedule.noisy(given.latents, given.noise, times)
        inputs = diffusers_unet.UNetInputs(
            noisy, times, given.text, given.pooled, size_ids(len(times))
        )
        diffusers_unet.predict(stack.unet, stack.slot, reading, inputs)

    with autocast():
        found = matched.read(float(t), forward, at_once=len(matched.pictures))
    return prepared.with_references(found)


@torch.no_grad()
def draw(
    stack: Stack,
    tasks: Sequence[Task],
    captions: Sequence[str],
    variant: Variant,
    *,
    steps: int = STEPS,
) -> Tensor:
    """(B,3,H,W) in [-1,1]."""
    count = len(tasks)
    text, pooled = stack.encode_text(captions)
    empty, empty_pooled = stack.encode_text([""])
    prepared = None
    if variant.model is not None:
        prepared = prepare_tasks(variant, Encoder(stack, variant.model), tasks)
    states = torch.cat((text, empty.expand(count, -1, -1)))
    labels = torch.cat((pooled, empty_pooled.expand(count, -1)))

    def predict(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        call = None
        if prepared is not None:
            now = read_references(stack, prepared, int(t))
            blank = done(stack, int(t)) <= BLANK
            call = make_call(now, cast(Any, variant.model), count, count, blank=blank)
        with autocast():
            inputs = diffusers_unet.UNetInputs(
                torch.cat((z, z)), t.expand(2 * count), states, labels, size_ids(2 * count)
            )
            both = diffusers_unet.predict(stack.unet, stack.slot, call, inputs).float()
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional

    noise = torch.stack([task.noise((4, SIDE, SIDE)) for task in tasks])
    z = ddim(noise, predict, steps=steps, guidance=GUIDANCE, schedule=stack.schedule)
    return stack.decode_pictures(z)
