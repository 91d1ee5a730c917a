"""Key and value maps of the subjects' features at every block (Eq. 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from .keys import KeyValue


class Projection(nn.Module):
    """Key and value maps of one block for subject features; with ``gate``, the map of the text's
    attention to :func:`.equations.text_gate`."""

    def __init__(
        self,
        inputs: int,
        width: int,
        operations: Any,
        dtype: Any,
        device: Any,
        *,
        gate: bool = False,
    ) -> None:
        super().__init__()
        kw: dict[str, Any] = {"bias": False, "dtype": dtype, "device": device}
        self.to_k = operations.Linear(inputs, width, **kw)
        self.to_v = operations.Linear(inputs, width, **kw)
        self.gate = operations.Linear(width, 1, **kw) if gate else None

    def forward(self, x: Tensor) -> KeyValue:
        """(R,T,inputs) -> keys and values (R,T,width)."""
        return KeyValue(self.to_k(x), self.to_v(x))

    def gate_row(self) -> Tensor | None:
        """The gate's map (1,width), None without one; a copy, because the module goes back to where
        it is kept."""
        return None if self.gate is None else self.gate.weight.clone()


class ProjectionTable(nn.Module):
    """One :class:`Projection` per site, under the site's number."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        operations: Any,
        dtype: Any,
        device: Any,
        *,
        gate: bool = False,
    ) -> None:
        super().__init__()
        for index, inputs, width in shapes:
            projection = Projection(inputs, width, operations, dtype, device, gate=gate)
            self.add_module(str(index), projection)

    def at(self, index: int) -> Projection:
        """The projection of block ``index``."""
        return cast(Projection, self.get_submodule(str(index)))


class Projections(nn.Module):
    """K and V maps for the CLIP tokens (blocks 1..L) and the reference features (2..L)."""

    def __init__(self, clip: ProjectionTable | None, reference: ProjectionTable | None) -> None:
        super().__init__()
        self.clip = clip
        self.reference = reference
