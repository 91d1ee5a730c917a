"""When each subject acts, in noise levels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Noise levels between which one subject acts."""

    start: float
    end: float

    def holds(self, sigma: float) -> bool:
        """Both ends count; an empty window holds nothing, also where a step falls on it."""
        return self.end < self.start and self.end <= sigma <= self.start
