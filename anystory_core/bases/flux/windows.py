"""Windows of the sampling: the steps of the authors' code as noise levels.

They count steps: of n, step i acts where ``floor(n start + 1/2) <= i < floor(n end + 1/2)``. A
sampler of the host shows only the noise level of a call, so the edges lie half a step before the
fraction: step i of n has the noise level of the fraction i / n, and ``i > n f - 1/2`` is the same
as ``i / n > f - 1 / (2 n)``. A step that falls on an edge is not yet inside; rounding must not let
it in, so the edge is a hair later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_HAIR = 0.005  # of a step: more than tables of noise levels are off, less than 0.01 of a fraction


@dataclass(frozen=True)
class SigmaWindow:
    """Noise levels ``end <= sigma < start`` at which something acts."""

    start: float
    end: float

    def holds(self, sigma: float) -> bool:
        """Whether a call at ``sigma`` is inside."""
        return self.end <= sigma < self.start

    @property
    def empty(self) -> bool:
        """No noise level is inside."""
        return self.start <= self.end


def sigma_window(
    start: float, end: float, steps: int, to_sigma: Callable[[float], float]
) -> SigmaWindow:
    """The fractions ``start`` to ``end`` of ``steps`` steps from pure noise to the picture.

    to_sigma: the noise level of a fraction of the sampling. A window from 0 holds every level above
    its end, one until 1 every level down to 0, whatever a sampler asks between its steps."""

    def edge(fraction: float) -> float:
        return to_sigma(fraction - (0.5 - _HAIR) / steps)

    first = math.inf if start < 0.5 / steps else edge(start)
    last = 0.0 if end >= 1 else math.inf if end < 0.5 / steps else edge(end)
    return SigmaWindow(first, last)


def full_steps(steps: int, first: float, to_sigma: Callable[[float], float]) -> int:
    """Steps of the whole schedule of which ``steps`` are run, from the noise level ``first`` on:
    a run that refines a picture begins late. to_sigma falls from the fraction 0 to 1."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if to_sigma(middle) > first:
            low = middle
        else:
            high = middle
    begun = low if low > 1e-6 else 0.0
    return max(steps, round(steps / max(1 - begun, 1e-3)))
