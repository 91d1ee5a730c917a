"""The moving average of what a run trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..tensor_files import open_tensors, save_tensors

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

    def save(self, path: Path) -> None:
        """Write the averages, if any are kept."""
        if self:
            save_tensors(path, self.tensors, {})

    def load(self, path: Path) -> None:
        """Go on from a file of :meth:`save`; without it, from the weights as they are."""
        self.begin()
        if not self or not path.exists():
            return
        with open_tensors(path) as file:
            for name, tensor in self.tensors.items():
                tensor.copy_(file.get_tensor(name))
