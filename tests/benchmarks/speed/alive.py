"""Bytes of the tensors that are alive while a step runs."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Follows every storage that an operator makes until it is freed.

    What was there before (weights, keys and values) is not counted, nor is the workspace that an
    operator frees before it returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._now = 0
        self._alive: dict[int, tuple[str, int]] = {}  # number -> operator and shape, bytes
        self._when_most: dict[int, tuple[str, int]] = {}
        self._made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _place(tensor) not in given:
                given.add(_place(tensor))
                self._follow(tensor, str(func.overloadpacket))
        return out

    def _follow(self, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        number, self._made = self._made, self._made + 1
        self._alive[number] = f"{operator} {tuple(tensor.shape)}", storage.nbytes()
        self._now += storage.nbytes()
        weakref.finalize(storage, self._free, number)
        if self._now > self.most:
            self.most, self._when_most = self._now, dict(self._alive)

    def _free(self, number: int) -> None:
        self._now -= self._alive.pop(number)[1]

    def largest(self, count: int) -> list[tuple[str, int]]:
        """(operator and shape, bytes) of the largest, alike ones together, when most was alive."""
        together: dict[str, int] = {}
        for name, size in self._when_most.values():
            together[name] = together.get(name, 0) + size
        return sorted(together.items(), key=lambda item: -item[1])[:count]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
