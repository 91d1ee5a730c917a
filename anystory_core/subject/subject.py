"""An encoded subject: made once, used by any number of sampling runs, never changed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

from ..errors import ModelMismatchError, SubjectError

EASINGS: dict[str, Callable[[float], float]] = {  # [0,1] -> [0,1], from 0 to 1
    "linear": lambda t: t,
    "ease in": lambda t: t * t,
    "ease out": lambda t: t * (2 - t),
    "ease in and out": lambda t: t * t * (3 - 2 * t),
}


@dataclass(frozen=True, kw_only=True)
class SubjectOptions:
    """How strongly, and in which part of the sampling, one subject acts.

    strength: eta_i >= 0 of Eq. 5, times the overall strength. reference_strength: s_i >= 0, where
    gamma of Eq. 7 is ln(overall s * s_i); 1 is the paper, 0 is off. start, end in [0,1]: fraction
    of the sampling, 0 = pure noise. Both strengths are multiplied by a factor >= 0 that goes from
    ``at_start`` to ``at_end`` between the two, by one of :data:`EASINGS`.
    """

    strength: float = 1.0
    reference_strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    at_start: float = 1.0
    at_end: float = 1.0
    easing: str = "linear"

    def __post_init__(self) -> None:
        if self.easing not in EASINGS:
            raise SubjectError(f"easing: got {self.easing!r}, expected one of {list(EASINGS)}")
        for name in ("strength", "reference_strength", "at_start", "at_end"):
            value = getattr(self, name)
            # Files may hold integers of any size; those beyond every float count as infinite.
            if not 0 <= value <= sys.float_info.max:
                raise SubjectError(f"{name}: got {value}, expected a number of 0 or more")
        for name in ("start", "end"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise SubjectError(f"{name}: got {value}, expected a fraction from 0 to 1")
        if self.start > self.end:
            raise SubjectError(
                f"start: got {self.start}, after end = {self.end}; expected start <= end"
            )

    @property
    def is_constant(self) -> bool:
        """Whether the strengths are the same over the whole window."""
        return self.at_start == self.at_end == 1

    def factor(self, progress: float) -> float:
        """Of both strengths, at ``progress`` in [0,1] from start to end."""
        return self.at_start + (self.at_end - self.at_start) * EASINGS[self.easing](progress)


AnySubject = TypeVar("AnySubject", bound="EncodedSubject")

UNNAMED = "subject"  # the label of a subject that was given none


@dataclass(frozen=True, kw_only=True)
class EncodedSubject:
    """What an encoded subject is for any base model, from V pictures of it.

    cutout (V,R,R,3) uint8 is what was encoded; fingerprint and clip_fingerprint name the AnyStory
    and the vision encoder's weights that encoded it ("" where nobody said).
    """

    family: ClassVar[str]  # the base model that it was encoded for

    label: str
    cutout: Tensor
    fingerprint: str
    clip_fingerprint: str = ""
    options: SubjectOptions = SubjectOptions()

    @property
    def views(self) -> int:
        """Number of pictures."""
        return self.cutout.shape[0]

    def with_options(self: AnySubject, options: SubjectOptions) -> AnySubject:
        """The same subject under other options; no tensor is copied."""
        return dataclasses.replace(self, options=options)

    def tensors(self) -> dict[str, Tensor]:
        """All that the model uses, under the names of a saved subject."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Subject(EncodedSubject):
    """Everything the U-Net needs of one subject.

    tokens (V*T, C) or None without a subject encoder; features: L-1 tensors (V*G_l, d_l), empty
    without a ReferenceNet; routing (d_r,) or None without a routing encoder. background_tokens
    (T,C) and background_routing (d_r,) are those of the zero image, the same for all subjects of a
    model. states (V,S,W), the pictures' CLIP states, and phrase (P,), a pooled text state of the
    label, are there for weights whose tokens depend on the subject's place (:mod:`.grounding`).
    latents (V,4,h,w) are the pictures' own, at the U-Net's scale, and inside (V,h,w) in [0,1] their
    masks on that grid; None where nobody said. text (S,C) and pooled (P,) are the label's text
    states; None without a label or a text encoder.
    """

    family: ClassVar[str] = "sdxl"

    tokens: Tensor | None
    features: tuple[Tensor, ...]
    routing: Tensor | None
    background_tokens: Tensor | None
    background_routing: Tensor | None
    states: Tensor | None = None
    phrase: Tensor | None = None
    inside: Tensor | None = None
    latents: Tensor | None = None
    text: Tensor | None = None
    pooled: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        optional = {
            "tokens": self.tokens,
            "routing": self.routing,
            "background_tokens": self.background_tokens,
            "background_routing": self.background_routing,
            "states": self.states,
            "phrase": self.phrase,
            "inside": self.inside,
            "latents": self.latents,
            "text": self.text,
            "pooled": self.pooled,
        }
        there = {name: x for name, x in optional.items() if x is not None}
        return there | {f"features.{i}": x for i, x in enumerate(self.features, start=2)}

    def map(self, function: Callable[[Tensor], Tensor]) -> Subject:
        """Apply ``function`` to every tensor that the U-Net uses (device or dtype changes)."""

        def optional(x: Tensor | None) -> Tensor | None:
            return None if x is None else function(x)

        return dataclasses.replace(
            self,
            tokens=optional(self.tokens),
            features=tuple(function(x) for x in self.features),
            routing=optional(self.routing),
            background_tokens=optional(self.background_tokens),
            background_routing=optional(self.background_routing),
            states=optional(self.states),
            phrase=optional(self.phrase),
            latents=optional(self.latents),
            text=optional(self.text),
            pooled=optional(self.pooled),
        )


def subjects_of(
    kind: type[AnySubject], subjects: Sequence[EncodedSubject], fingerprint: str
) -> list[AnySubject]:
    """The subjects, for a model of the base of ``kind`` whose weights are named ``fingerprint``.
    ModelMismatchError: one was encoded for another base, or by other weights."""
    found: list[AnySubject] = []
    for subject in subjects:
        if not isinstance(subject, kind):
            raise ModelMismatchError(
                f"subject {subject.label!r} was encoded for {subject.family}, the AnyStory weights "
                f"are for {kind.family}; encode it again with these"
            )
        if subject.fingerprint != fingerprint:
            raise ModelMismatchError(
                f"subject {subject.label!r} was encoded by other AnyStory weights "
                f"({subject.fingerprint or 'unsaved'}) than those in use "
                f"({fingerprint or 'unsaved'}); encode it again with these"
            )
        found.append(subject)
    return found
