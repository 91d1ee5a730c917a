"""What one sampling run needs: the subjects' keys and values, projected once, and a route source.

K, V of Eq. 5 and 6 depend on the subjects and the weights alone, not on the step, so a run projects
them before its first step and holds nothing of the ReferenceNet or of the projections afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bases.sdxl.sites import Site
from ..errors import ModelMismatchError, RoutingError
from ..routing.sources import LearnedRoutes, MaskRoutes, RouteSource, SingleRoute
from ..routing.words import TextRoutes, Texts
from ..subject.subject import UNNAMED, Subject
from ..weights.model import AnyStoryModel, Projections
from .equations import Candidates, Tables

MODES = ("learned", "masks", "learned within masks", "text", "text within masks")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Overall strengths; each subject's own are multiplied in
    (:class:`~..subject.subject.SubjectOptions`).

    ``keep_references_in_uncond``: unconditional rows keep the reference features (the paper's
    training drops only CLIP); they then route by their own hidden states.
    """

    strength: float = 1.0
    reference_strength: float = 1.0
    keep_references_in_uncond: bool = False


@dataclass(frozen=True)
class SiteConditions:
    """Projected keys and values of all C = N + 1 candidates at one block."""

    clip: Candidates
    reference: Candidates


@dataclass(frozen=True)
class Run:
    """Everything constant over one sampling run. Built by :func:`prepare_run`. ``agree``: the
    blocks of a pass decide together which subject is where (:mod:`..routing.agreement`)."""

    conditions: tuple[SiteConditions, ...]  # conditions[l - 1]
    source: RouteSource | TextRoutes
    strengths: tuple[float, ...]  # eta_i for N subjects and the background
    biases: tuple[float, ...]  # gamma_i, the same
    keep_references_in_uncond: bool = False
    agree: bool = False
    tables: Tables = field(default_factory=Tables, compare=False, repr=False)

    @property
    def subjects(self) -> int:
        """N."""
        return len(self.strengths) - 1

    def is_idle(self, active: Sequence[bool]) -> bool:
        """Nothing to inject: the host then runs the plain model, bit for bit."""
        return not any(
            on and (eta > 0 or gamma > -math.inf)
            for on, eta, gamma in zip(active, self.strengths, self.biases, strict=False)
        )


def project(
    projections: Projections,
    sites: Sequence[Site],
    tokens: Sequence[Tensor | None],
    features: Sequence[Sequence[Tensor] | None],
) -> tuple[SiteConditions, ...]:
    """Apply every block's K and V maps once.

    tokens: E_i (R,T,C) of each candidate, the background's last. features: G_i^2..G_i^L, each
    (R,G,d_l). None: the candidate has none. Differentiable.
    """
    conditions: list[SiteConditions] = []
    for site in sites:
        clip = reference = None
        if projections.clip is not None:
            clip = projections.clip.at(site.index)
        if projections.reference is not None and site.index > 1:
            reference = projections.reference.at(site.index)
        conditions.append(
            SiteConditions(
                Candidates([None if clip is None or e is None else clip(e) for e in tokens]),
                Candidates(
                    [
                        None if reference is None or not g else reference(g[site.index - 2])
                        for g in features
                    ]
                ),
            )
        )
    return tuple(conditions)


def prepare_run(
    model: AnyStoryModel,
    subjects: Sequence[Subject],
    source: RouteSource | TextRoutes,
    settings: Settings,
    *,
    agree: bool = False,
) -> Run:
    """Project all subjects for one run. The subjects' tensors are on the device and in the dtype of
    ``model.projections``. A branch at strength 0 is not projected."""
    if source.candidates != len(subjects) + 1:
        raise RoutingError(
            f"routing: made for {source.candidates - 1} subjects, got {len(subjects)}"
        )
    if not subjects:
        raise RoutingError("routing: got no subject, expected at least one")
    background = subjects[0].background_tokens if settings.strength > 0 else None
    strengths = [settings.strength * s.options.strength for s in subjects]
    biases = [_log(settings.reference_strength * s.options.reference_strength) for s in subjects]
    tokens: list[Tensor | None] = [
        s.tokens[None] if s.tokens is not None and eta > 0 else None
        for s, eta in zip(subjects, strengths, strict=True)
    ]
    features: list[Sequence[Tensor] | None] = [
        [g[None] for g in s.features] if gamma > -math.inf else None
        for s, gamma in zip(subjects, biases, strict=True)
    ]
    tokens.append(None if background is None else background[None])
    conditions = project(model.projections, model.sites, tokens, [*features, None])
    return Run(
        conditions,
        source,
        (*strengths, settings.strength),
        (*biases, -math.inf),
        settings.keep_references_in_uncond,
        agree,
    )


def _log(strength: float) -> float:
    """gamma = ln s; the bias of Eq. 7 for a multiplicative reference strength."""
    return math.log(strength) if strength > 0 else -math.inf


def _check_subjects(model: AnyStoryModel, subjects: Sequence[Subject]) -> None:
    for subject in subjects:
        if subject.fingerprint != model.fingerprint:
            raise ModelMismatchError(
                f"subject {subject.label!r} was encoded by other AnyStory weights "
                f"({subject.fingerprint or 'unsaved'}) than those in use "
                f"({model.fingerprint or 'unsaved'}); encode it again with these"
            )


def check_routing(
    mode: str,
    model: AnyStoryModel,
    subjects: Sequence[Subject],
    masks: Sequence[Tensor | None],
    *,
    text: bool = False,
) -> None:
    """RoutingError or ModelMismatchError, saying what to load or to connect, unless
    :func:`build_source` and :func:`prepare_run` can work with this. ``text``: the labels are there
    as text states."""
    if mode not in MODES:
        raise RoutingError(f"mode: got {mode!r}, expected one of {list(MODES)}")
    _check_subjects(model, subjects)
    missing = [i + 1 for i, m in enumerate(masks) if m is None]
    if mode not in ("learned", "text") and missing:
        raise RoutingError(
            f"mode {mode!r}: the mask of subject {missing} is missing; connect one mask for each "
            "subject, or choose a mode without masks"
        )
    if mode.startswith("text"):
        _check_labels(mode, subjects, text)
        return
    if mode == "masks" or (mode == "learned" and model.routers is None and len(subjects) == 1):
        return
    if model.routers is None:
        raise RoutingError(
            f"mode {mode!r}: these AnyStory weights hold no router, which this mode needs for "
            f"{len(subjects)} subject{'s' if len(subjects) > 1 else ''}; load weights with a "
            "router, or choose the mode 'masks' with one mask for each subject, or 'text' with a "
            "clip"
        )
    if any(s.routing is None or s.background_routing is None for s in subjects):
        raise RoutingError(
            f"mode {mode!r}: the subjects carry no routing feature; encode them with weights that "
            "hold the routing encoder"
        )


def _check_labels(mode: str, subjects: Sequence[Subject], text: bool) -> None:
    """Routing by text needs the words, and words that differ where no mask tells them apart."""
    if not text:
        raise RoutingError(
            f"mode {mode!r}: connect the clip that encodes the prompt; it reads the labels"
        )
    labels = [s.label.strip().casefold() for s in subjects]
    for number, label in enumerate(labels, 1):
        if label in ("", UNNAMED):
            raise RoutingError(
                f"mode {mode!r}: subject {number} has no label; give its Encode Subject node the "
                "words that name it in the prompt"
            )
        if mode == "text" and label in labels[: number - 1]:
            raise RoutingError(
                f"mode {mode!r}: subjects {labels.index(label) + 1} and {number} are both labelled "
                f"{label!r}, so their words find the same place; give them different labels, or "
                "choose 'text within masks'"
            )


def build_source(
    mode: str,
    model: AnyStoryModel,
    subjects: Sequence[Subject],
    masks: Sequence[Tensor | None],
    texts: Texts | None = None,
) -> RouteSource | TextRoutes:
    """The source of routes for a SubjectRouter mode; see :func:`check_routing` for its errors.

    masks: (H,W) float in [0,1] per subject or None; the modes with masks need every one. texts:
    the labels' text states, for the modes with text. A model without routers routes a single
    subject everywhere.
    """
    check_routing(mode, model, subjects, masks, text=texts is not None)
    given = MaskRoutes(tuple(m for m in masks if m is not None))
    if mode == "masks":
        return given
    within = given if mode.endswith("within masks") else None
    if mode.startswith("text") and texts is not None:
        return TextRoutes(texts, model.sites, masks=within)
    if model.routers is None:
        return SingleRoute()
    features = [*(s.routing for s in subjects), subjects[0].background_routing]
    return LearnedRoutes.prepare(
        model.routers, torch.stack([f for f in features if f is not None])[None], masks=within
    )
