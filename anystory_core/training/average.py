"""The moving average of what a run trains."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

Named = Callable[[], Iterator[tuple[str, Tensor]]]  # what is trained, by its name in a weights file


class Average:
    """float32 averages of what ``trained`` names, or nothing with a ``decay`` of 0.

    The decay of step s is at most (1 + s) / (10 + s), so that the first steps are soon forgotten.
    """

    def __init__(self, trained: Named, decay: float) -> None:
        self._trained, self._decay = trained, decay
        self.tensors: dict[str, Tensor] = {}
        self.begin()

    def __bool__(self) -> bool:
        return bool(self._decay)

    def begin(self) -> None:
        """Start from the weights as they are."""
        named = self._trained() if self else iter(())
        self.tensors = {name: p.detach().float().clone() for name, p in named}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step``, counted from 0."""
        if not self:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._trained():
            self.tensors[name].lerp_(parameter.detach().float(), 1 - decay)

    @contextmanager
    def applied(self) -> Generator[None, None, None]:
        """Inside ``with``, the averages are the weights, if any are kept."""
        live = {name: p.detach().clone() for name, p in self._trained()} if self else {}
        self._put(self.tensors)
        try:
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trained():
            if name in tensors:
                parameter.copy_(tensors[name])
