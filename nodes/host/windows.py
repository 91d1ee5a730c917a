"""When each subject acts, and how strongly, in noise levels."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...anystory_core.subject.subject import SubjectOptions

_PARTS = 64  # of a window, between which progress is interpolated


@dataclass(frozen=True)
class Ramp:
    """How the strength of a subject changes over its own window."""

    options: SubjectOptions
    levels: tuple[float, ...]  # noise levels at equal parts of the window, falling

    @classmethod
    def of(cls, options: SubjectOptions, model_sampling: Any) -> Ramp | None:
        """None for a strength that does not change."""
        if options.is_constant:
            return None
        to_sigma, most = model_sampling.percent_to_sigma, float(model_sampling.sigma_max)
        parts = [i / _PARTS for i in range(_PARTS + 1)]
        percents = [options.start + (options.end - options.start) * part for part in parts]
        # The host's noise level at 0 % is a number beyond all of the model's.
        return cls(options, tuple(min(float(to_sigma(percent)), most) for percent in percents))

    def factor(self, sigma: float) -> float:
        """Of the strengths, at a noise level; beyond the window as at its nearer end."""
        after = bisect(self.levels, -sigma, key=lambda level: -level)
        if after == 0:
            return self.options.factor(0.0)
        if after == len(self.levels):
            return self.options.factor(1.0)
        before, behind = self.levels[after - 1], self.levels[after]
        part = (before - sigma) / (before - behind)
        return self.options.factor((after - 1 + part) / _PARTS)


@dataclass(frozen=True)
class Window:
    """Noise levels between which one subject acts."""

    start: float
    end: float
    ramp: Ramp | None = None

    @classmethod
    def of(cls, options: SubjectOptions, start: float, end: float, model_sampling: Any) -> Window:
        """A subject's own window within the overall one, ``start`` to ``end`` of the sampling."""
        to_sigma: Callable[[float], Any] = model_sampling.percent_to_sigma
        return cls(
            float(to_sigma(max(start, options.start))),
            float(to_sigma(min(end, options.end))),
            Ramp.of(options, model_sampling),
        )

    def holds(self, sigma: float) -> bool:
        """Both ends count; an empty window holds nothing, also where a step falls on it."""
        return self.end < self.start and self.end <= sigma <= self.start

    def factor(self, sigma: float) -> float:
        """Of the subject's strengths: 0 outside of the window."""
        if not self.holds(sigma):
            return 0.0
        return 1.0 if self.ramp is None else self.ramp.factor(sigma)
