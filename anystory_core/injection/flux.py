"""The subjects of one sampling run on FLUX: what every pass of the run needs of them.

Keys and values of the references are not here: they depend on the prompt, and a pass makes them
when it first needs them (:func:`~..bases.flux.reference.reference_pass`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..bases.flux.attention import Grid
from ..bases.flux.call import Concepts
from ..bases.flux.config import FluxConfig
from ..bases.flux.low_rank import RoutingMaps, StreamBranches
from ..bases.flux.router import Router
from ..bases.flux.windows import SigmaWindow, sigma_window
from ..errors import RoutingError
from ..routing.grids import Crops
from ..routing.masks import check_counts
from ..routing.sources import MaskRoutes
from ..subject.flux import FluxSubject
from ..subject.subject import EncodedSubject, subjects_of
from .prepare import Settings

MODES = ("learned", "masks", "learned within masks")


class FluxRoutingModel(Protocol):
    """What of a model routes: a :class:`~..bases.flux.model.FluxModel`."""

    @property
    def config(self) -> FluxConfig: ...
    @property
    def router_branches(self) -> StreamBranches | None: ...
    @property
    def routing_maps(self) -> RoutingMaps | None: ...
    @property
    def fingerprint(self) -> str: ...


class Ramp(Protocol):
    """How the strength of a subject changes over the sampling."""

    def factor(self, sigma: float) -> float:
        """Of both strengths, at a noise level."""
        ...


@dataclass(frozen=True)
class FluxRun:
    """The subjects of one run. concepts: each one's tokens at their strength; biases: gamma of its
    references, -inf where they are off; latents and keep: its pictures; ramps: what changes both
    strengths over the run, None for nothing. ``router`` decides who is where, on tokens that
    ``masks`` leave to a subject; without a router the masks decide, and without both every token
    looks at all subjects.
    """

    concepts: Concepts
    biases: tuple[float, ...]
    latents: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]
    concept_windows: tuple[SigmaWindow, ...]
    reference_windows: tuple[SigmaWindow, ...]
    ramps: tuple[Ramp | None, ...]
    router: Router | None = None
    masks: MaskRoutes | None = None
    keep_in_uncond: bool = False

    def to(self, device: torch.device, dtype: torch.dtype) -> FluxRun:
        """With the tokens that every pass reads on a device; pictures stay where they are."""
        router = self.router
        if router is not None:
            router = dataclasses.replace(router, tokens=router.tokens.to(device, dtype))
        tokens = tuple(None if x is None else x.to(device, dtype) for x in self.concepts.tokens)
        concepts = dataclasses.replace(self.concepts, tokens=tokens)
        return dataclasses.replace(self, concepts=concepts, router=router)

    @property
    def idle(self) -> bool:
        """Nothing of any subject acts at any noise level: the model must run as without us."""
        windows = zip(self.concept_windows, self.reference_windows, strict=True)
        return all(
            (concept is None or own.empty) and (bias == -math.inf or theirs.empty)
            for concept, bias, (own, theirs) in zip(
                self.concepts.tokens, self.biases, windows, strict=True
            )
        )

    def concepts_at(self, sigma: float) -> Concepts:
        """The subjects' tokens that are inside their windows."""
        found: list[Tensor | None] = []
        repeats: list[int] = []
        for tokens, again, window, ramp in zip(
            self.concepts.tokens,
            self.concepts.repeats,
            self.concept_windows,
            self.ramps,
            strict=True,
        ):
            factor = 1.0 if ramp is None else ramp.factor(sigma)
            if tokens is None or factor == 0 or not window.holds(sigma):
                tokens, again = None, 0
            found.append(tokens if tokens is None or factor == 1 else tokens * factor)
            repeats.append(again)
        return Concepts(tuple(found), tuple(repeats))

    def biases_at(self, sigma: float) -> tuple[float, ...]:
        """gamma of the references that are inside their windows, -inf for the others."""
        return tuple(
            bias + (0.0 if ramp is None else _log(ramp.factor(sigma)))
            if window.holds(sigma)
            else -math.inf
            for bias, window, ramp in zip(
                self.biases, self.reference_windows, self.ramps, strict=True
            )
        )

    @property
    def pictures(self) -> int:
        """How many pictures of a batch have masks of their own; 1: all have the same or none."""
        return 1 if self.masks is None else self.masks.pictures

    def regions(self, grid: Grid, crops: Crops, device: torch.device) -> Tensor | None:
        """Region ids (rows,M) where the masks decide, a row for each of the crops; N for nobody.
        Ties to the lower number."""
        if self.masks is None or self.router is not None:
            return None
        weights = self.masks.subject_weights(grid, crops, device)
        background = 1 - weights.amax(dim=1, keepdim=True)
        return torch.cat((weights, background), dim=1).argmax(dim=1).expand(len(crops), -1)

    def allowed(self, grid: Grid, crops: Crops, device: torch.device) -> Tensor | None:
        """(1 or rows,N,M) bool: where the masks leave a token to a subject of the router's."""
        if self.masks is None or self.router is None:
            return None
        return self.masks.allowed(grid, crops, device)[:, :-1]


def check_settings(settings: Settings) -> None:
    """RoutingError: a setting that FLUX does not know."""
    if settings.references not in (None, "masked", "off"):
        raise RoutingError(
            f"references: got {settings.references!r}; on FLUX they are those inside the subject's "
            "mask, as in the authors' code: choose 'as in the file', 'masked' or 'off'"
        )


def check_flux_routing(
    mode: str,
    model: FluxRoutingModel,
    subjects: Sequence[EncodedSubject],
    masks: Sequence[Tensor | None],
) -> list[FluxSubject]:
    """The subjects, or a RoutingError or ModelMismatchError that says what to load or to connect,
    unless :func:`prepare_flux` can work with this."""
    if mode not in MODES:
        raise RoutingError(
            f"mode: got {mode!r}, expected one of {list(MODES)}; routing by text reads the "
            "cross-attention of SDXL, which FLUX does not have"
        )
    found = subjects_of(FluxSubject, subjects, model.fingerprint)
    missing = [i + 1 for i, m in enumerate(masks) if m is None]
    if mode != "learned" and missing:
        raise RoutingError(
            f"mode {mode!r}: the mask of subject {missing} is missing; connect one mask for each "
            "subject, or choose the mode 'learned'"
        )
    if mode != "learned":
        check_counts(masks)
    if mode == "masks" or len(found) < 2:
        return found
    if model.router_branches is None or model.routing_maps is None:
        raise RoutingError(
            f"mode {mode!r}: these AnyStory weights hold no router, which this mode needs for "
            f"{len(found)} subjects; convert the authors' whole file, or choose the mode 'masks'"
        )
    if any(subject.routing is None for subject in found):
        raise RoutingError(
            f"mode {mode!r}: the subjects carry no routing tokens; encode them with weights that "
            "hold the router's embedder"
        )
    return found


def prepare_flux(
    mode: str,
    model: FluxRoutingModel,
    subjects: Sequence[EncodedSubject],
    masks: Sequence[Tensor | None],
    settings: Settings,
    *,
    window: tuple[float, float],
    steps: int,
    to_sigma: Callable[[float], float],
    ramps: Sequence[Ramp | None],
) -> FluxRun:
    """Bring strengths and windows of one run together. window: fractions of the sampling in which
    subjects act at all; steps: of the whole schedule; to_sigma: the noise level of a fraction;
    ramps: one for each subject. Errors as :func:`check_flux_routing` and :func:`check_settings`."""
    check_settings(settings)
    found = check_flux_routing(mode, model, subjects, masks)
    given = [m for m in masks if m is not None]
    several = len(found) > 1
    router = None
    if several and mode.startswith("learned"):
        tokens = [subject.routing for subject in found if subject.routing is not None]
        assert model.router_branches is not None and model.routing_maps is not None
        router = Router(
            model.router_branches,
            model.routing_maps,
            torch.cat(tokens)[None],
            tuple(x.shape[0] for x in tokens),
        )
    defaults = model.config.windows
    timing = settings.timing
    start = timing.reference_start
    if start is None:
        start = defaults.start(len(found))
    concept_start, concept_end = timing.concept or (defaults.concept_start, defaults.concept_end)

    def windows(first: float, last: float) -> tuple[SigmaWindow, ...]:
        return tuple(
            sigma_window(
                max(first, window[0], s.options.start),
                min(last, window[1], s.options.end),
                steps,
                to_sigma,
            )
            for s in found
        )

    # A subject whose strengths are 0 at both ends of its ramp has none.
    reference = 0.0 if settings.references == "off" else settings.reference_strength
    acts = [max(s.options.at_start, s.options.at_end) > 0 for s in found]
    concept = defaults.concept_scale * settings.strength
    return FluxRun(
        concepts=Concepts.merged(
            [
                _scaled(s.concept, concept * s.options.strength * on)
                for s, on in zip(found, acts, strict=True)
            ]
        ),
        biases=tuple(
            _log(reference * s.options.reference_strength * on)
            for s, on in zip(found, acts, strict=True)
        ),
        latents=tuple(s.latents for s in found),
        keep=tuple(s.keep for s in found),
        concept_windows=windows(concept_start, concept_end),
        reference_windows=windows(start, defaults.reference_end),
        ramps=tuple(ramps),
        router=router,
        masks=MaskRoutes(tuple(given)) if mode != "learned" else None,
        keep_in_uncond=settings.keep_references_in_uncond,
    )


def _scaled(tokens: Tensor | None, scale: float) -> Tensor | None:
    return None if tokens is None or scale == 0 else tokens * scale


def _log(strength: float) -> float:
    """gamma = ln s for a multiplicative reference strength."""
    return math.log(strength) if strength > 0 else -math.inf
