"""The modes of routing: what each needs, and the source of routes that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..bases.base import Site
from ..errors import RoutingError
from ..subject.subject import UNNAMED, EncodedSubject, Subject, subjects_of
from .masks import check_counts
from .router import Routers
from .sources import LearnedRoutes, MaskRoutes, RouteSource, SingleRoute
from .words import TextRoutes, Texts

MODES = ("learned", "masks", "learned within masks", "text", "text within masks")


class RoutingModel(Protocol):
    """What of a model routes: an :class:`~..weights.model.AnyStoryModel`."""

    @property
    def sites(self) -> Sequence[Site]: ...
    @property
    def routers(self) -> Routers | None: ...
    @property
    def fingerprint(self) -> str: ...


def check_routing(
    mode: str,
    model: RoutingModel,
    subjects: Sequence[EncodedSubject],
    masks: Sequence[Tensor | None],
    *,
    text: bool = False,
    text_block: int = 0,
) -> None:
    """RoutingError or ModelMismatchError, saying what to load or to connect, unless
    :func:`build_source` and :func:`~..injection.prepare.prepare_subjects` can work with this.
    ``text``: the labels are there as text states. ``text_block``: as in :func:`build_source`."""
    if mode not in MODES:
        raise RoutingError(f"mode: got {mode!r}, expected one of {list(MODES)}")
    if not 0 <= text_block <= len(model.sites):
        raise RoutingError(
            f"text_block: got {text_block}, expected 0 (all blocks) to {len(model.sites)}"
        )
    own = subjects_of(Subject, subjects, model.fingerprint)
    missing = [i + 1 for i, m in enumerate(masks) if m is None]
    if mode not in ("learned", "text") and missing:
        raise RoutingError(
            f"mode {mode!r}: the mask of subject {missing} is missing; connect one mask for each "
            "subject, or choose a mode without masks"
        )
    if mode.endswith("masks"):
        check_counts(masks)
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
    if any(s.routing is None or s.background_routing is None for s in own):
        raise RoutingError(
            f"mode {mode!r}: the subjects carry no routing feature; encode them with weights that "
            "hold the routing encoder"
        )


def _check_labels(mode: str, subjects: Sequence[EncodedSubject], text: bool) -> None:
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
    model: RoutingModel,
    subjects: Sequence[Subject],
    masks: Sequence[Tensor | None],
    texts: Texts | None = None,
    text_block: int = 0,
) -> RouteSource | TextRoutes:
    """The source of routes for a SubjectRouter mode; see :func:`check_routing` for its errors.

    masks: (H,W) float in [0,1] per subject or None; the modes with masks need every one. texts:
    the labels' text states, for the modes with text, in which block ``text_block`` alone speaks (0:
    all). A model without routers routes a single subject everywhere.
    """
    check_routing(mode, model, subjects, masks, text=texts is not None, text_block=text_block)
    given = MaskRoutes(tuple(m for m in masks if m is not None))
    if mode == "masks":
        return given
    within = given if mode.endswith("within masks") else None
    if mode.startswith("text") and texts is not None:
        return TextRoutes(texts, model.sites, masks=within, block=text_block)
    if model.routers is None:
        return SingleRoute()
    features = [*(s.routing for s in subjects), subjects[0].background_routing]
    return LearnedRoutes.prepare(
        model.routers, torch.stack([f for f in features if f is not None])[None], masks=within
    )


def source_of_run(
    source: RouteSource | TextRoutes, mode: str, masks: Sequence[Tensor | None]
) -> RouteSource | TextRoutes:
    """A source that :func:`build_source` has made, for another run of the same subjects with other
    masks; nothing is made anew but what belongs to a run."""
    given = MaskRoutes(tuple(m for m in masks if m is not None))
    if isinstance(source, MaskRoutes):
        return given
    if isinstance(source, (LearnedRoutes, TextRoutes)):
        return source.of_run(given if mode.endswith("within masks") else None)
    return source
