"""The subjects of one sampling run: their keys and values, projected once, and a route source.

K, V of Eq. 5 and 6 depend on the subjects and the weights alone, not on the step, so a run projects
them before its first step and holds nothing of the ReferenceNet or of the projections afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from ..bases.base import Site
from ..bases.sdxl.config import AnyStoryConfig
from ..config import ClipBranchConfig, References
from ..errors import RoutingError
from ..routing.sources import RouteSource
from ..routing.words import TextRoutes
from ..subject.subject import Subject
from .keys import Candidates
from .matched import MatchedReferences, pictures_of, places_inside
from .projections import Projections


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When the parts of a subject act on FLUX, in fractions of the sampling; None: as the weights
    file says. concept: first and last of the tokens in the text stream. reference_start: first of
    the references."""

    concept: tuple[float, float] | None = None
    reference_start: float | None = None

    def __post_init__(self) -> None:
        ends = () if self.concept is None else self.concept
        start = () if self.reference_start is None else (self.reference_start,)
        for value in (*ends, *start):
            if not 0 <= value <= 1:
                raise RoutingError(f"timing: got {value}, expected a fraction from 0 to 1")
        if self.concept is not None and self.concept[0] > self.concept[1]:
            raise RoutingError(
                f"concept_start: got {self.concept[0]}, after concept_end = {self.concept[1]}; "
                "expected concept_start <= concept_end"
            )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Overall strengths; each subject's own are multiplied in
    (:class:`~..subject.subject.SubjectOptions`).

    ``references``: which references act; None: those that the weights' file says. Those of matched
    noise act from ``matched_start`` to ``matched_end`` of the sampling, 0 to 1.
    ``keep_references_in_uncond``: unconditional rows keep the reference features (the paper's
    training drops only CLIP); they then route by their own hidden states.
    """

    strength: float = 1.0
    reference_strength: float = 1.0
    keep_references_in_uncond: bool = False
    timing: Timing = Timing()
    references: References | None = None
    matched_start: float = 0.0
    matched_end: float = 1.0

    def __post_init__(self) -> None:
        for name in ("matched_start", "matched_end"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise RoutingError(f"{name}: got {value}, expected a fraction from 0 to 1")
        if self.matched_start > self.matched_end:
            raise RoutingError(
                f"matched_start: got {self.matched_start}, after matched_end = {self.matched_end}; "
                "expected matched_start <= matched_end"
            )


class InjectionModel(Protocol):
    """What of a model projects subjects: an :class:`~..weights.model.AnyStoryModel`."""

    @property
    def config(self) -> AnyStoryConfig: ...
    @property
    def sites(self) -> Sequence[Site]: ...
    @property
    def projections(self) -> Projections: ...
    @property
    def clip_branch(self) -> ClipBranchConfig: ...
    @property
    def references(self) -> References: ...
    @property
    def decoder_from(self) -> int: ...


@dataclass(frozen=True)
class SiteConditions:
    """Projected keys and values of all C = N + 1 candidates at one block."""

    clip: Candidates
    reference: Candidates
    gate: Tensor | None = None  # (1,d): how Eq. 5's second term reads the text's attention


@dataclass(frozen=True)
class PreparedSubjects:
    """The subjects as every pass of one sampling run needs them (:func:`prepare_subjects`).

    ``agree``: the blocks of a pass decide together which subject is where
    (:mod:`..routing.agreement`). ``matched``: the references are read anew at every noise level,
    and come in by :meth:`with_references`; until then there are none."""

    conditions: tuple[SiteConditions, ...]  # conditions[l - 1]
    source: RouteSource | TextRoutes
    strengths: tuple[float, ...]  # eta_i for N subjects and the background
    biases: tuple[float, ...]  # gamma_i, the same
    keep_references_in_uncond: bool = False
    agree: bool = False
    matched: MatchedReferences | None = None

    @property
    def subjects(self) -> int:
        """N."""
        return len(self.strengths) - 1

    def with_references(self, references: Mapping[int, Candidates]) -> PreparedSubjects:
        """The same with other references at the blocks that are keys of the table."""
        conditions = tuple(
            replace(before, reference=references.get(index, before.reference))
            for index, before in enumerate(self.conditions, 1)
        )
        return replace(self, conditions=conditions)

    def is_idle(self, factors: Sequence[float]) -> bool:
        """Nothing to inject with these factors of the subjects' strengths: the host then runs the
        plain model, bit for bit."""
        return not any(
            factor > 0 and (eta > 0 or gamma > -math.inf)
            for factor, eta, gamma in zip(factors, self.strengths, self.biases, strict=False)
        )


def project(
    projections: Projections,
    sites: Sequence[Site],
    tokens: Sequence[Tensor | None],
    features: Sequence[Sequence[Tensor] | None],
    *,
    references_from: int = 2,
) -> tuple[SiteConditions, ...]:
    """Apply every block's K and V maps once.

    tokens: E_i (R,T,C) of each candidate, the background's last. features: G_i^2..G_i^L, each
    (R,G,d_l). None: the candidate has none. Blocks before ``references_from`` have no references.
    Differentiable.
    """
    conditions: list[SiteConditions] = []
    for site in sites:
        clip = reference = gate = None
        if projections.clip is not None:
            clip = projections.clip.at(site.index)
            gate = clip.gate_row()
        if projections.reference is not None and site.index >= references_from:
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
                gate,
            )
        )
    return tuple(conditions)


def prepare_subjects(
    model: InjectionModel,
    subjects: Sequence[Subject],
    source: RouteSource | TextRoutes,
    settings: Settings,
    *,
    agree: bool = False,
) -> PreparedSubjects:
    """Project all subjects for one run. The subjects' tensors are on the device and in the dtype of
    ``model.projections``. A branch at strength 0 is not projected."""
    if source.candidates != len(subjects) + 1:
        raise RoutingError(
            f"routing: made for {source.candidates - 1} subjects, got {len(subjects)}"
        )
    if not subjects:
        raise RoutingError("routing: got no subject, expected at least one")
    branch = model.clip_branch
    overall = branch.strength * settings.strength
    background = subjects[0].background_tokens if overall > 0 and branch.background else None
    strengths = [overall * s.options.strength for s in subjects]
    which = settings.references or model.references
    reference_strength = 0.0 if which == "off" else settings.reference_strength
    biases = [_log(reference_strength * s.options.reference_strength) for s in subjects]
    tokens: list[Tensor | None] = [
        s.tokens[None] if s.tokens is not None and eta > 0 else None
        for s, eta in zip(subjects, strengths, strict=True)
    ]
    masked, matched = "masked" in which, "matched" in which
    features: list[Sequence[Tensor] | None] = [
        [g[None] for g in (inside_features(s) if masked else s.features)]
        if gamma > -math.inf and not matched
        else None
        for s, gamma in zip(subjects, biases, strict=True)
    ]
    tokens.append(None if background is None else background[None])
    conditions = project(
        model.projections,
        model.sites,
        tokens,
        [*features, None],
        references_from=model.decoder_from if which == "masked in the decoder" else 2,
    )
    for each in conditions:
        each.clip.join()
        each.reference.join()
    return PreparedSubjects(
        conditions,
        source,
        (*strengths, overall),
        (*biases, -math.inf),
        settings.keep_references_in_uncond,
        agree,
        _matched(model, subjects, biases, settings, masked=masked) if matched else None,
    )


def _matched(
    model: InjectionModel,
    subjects: Sequence[Subject],
    biases: Sequence[float],
    settings: Settings,
    *,
    masked: bool,
) -> MatchedReferences | None:
    pictures = pictures_of(subjects, [gamma > -math.inf for gamma in biases], masked=masked)
    if not pictures:
        return None
    return MatchedReferences(
        pictures,
        model.sites,
        len(subjects),
        model.config.unet.context_dim,
        model.config.unet.pooled_dim,
        settings.matched_start,
        settings.matched_end,
    )


def inside_features(subject: Subject) -> list[Tensor]:
    """A subject's features without those whose place is less than half inside its mask; at least
    one of each picture stays. A subject that does not say where it is inside keeps all."""
    if subject.inside is None:
        return list(subject.features)
    kept: dict[int, Tensor] = {}
    chosen: list[Tensor] = []
    for feature in subject.features:
        places = feature.shape[0] // subject.views
        if places not in kept:
            side = math.isqrt(places)
            kept[places] = places_inside(subject.inside.cpu(), (side, side))
        chosen.append(feature[kept[places].to(feature.device)])
    return chosen


def _log(strength: float) -> float:
    """gamma = ln s; the bias of Eq. 7 for a multiplicative reference strength."""
    return math.log(strength) if strength > 0 else -math.inf
