"""Corrupt samples of a run: named once, replaced by their neighbours, and too many end it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..errors import DataError

MOST_CORRUPT = 0.01  # share of a run's samples at which it stops


class CorruptSamples:
    """Counts corrupt samples, each once however often it is drawn, and names it through ``say``."""

    def __init__(self, samples: int, say: Callable[[str], object]) -> None:
        """``samples``: how many the run has."""
        self._samples, self._say = samples, say
        self.found: dict[str, str] = {}  # key -> what is wrong with it

    def note(self, errors: Iterable[str]) -> None:
        """Take in errors, each begun with its sample's key. DataError when there are too many, but
        not for the first two."""
        for error in errors:
            key = error.split(":")[0]
            if key in self.found:
                continue
            self.found[key] = error
            self._say(f"a corrupt sample was replaced by the next: {error}")
        if len(self.found) > max(2, MOST_CORRUPT * self._samples):
            first = "; ".join(list(self.found.values())[:3])
            raise DataError(
                f"data: {len(self.found)} of {self._samples} samples are corrupt, more than "
                f"{MOST_CORRUPT:.0%}. First: {first}. Run `python -m anystory_core.data check`"
            )

    def summary(self) -> None:
        """Say at the end how many there were, and which."""
        if self.found:
            self._say(
                f"{len(self.found)} of {self._samples} samples were corrupt: {sorted(self.found)}"
            )
