"""The processes of a run: what all of them must agree on, and what one does for all."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from ..errors import AnyStoryError, ConfigError

T = TypeVar("T")


def on_cpu() -> bool:
    """Whether a run is for the CPU: asked for, or there is nothing else. accelerate reads its own
    variable in one of the two places where processes find each other, and elsewhere would let each
    train by itself."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y")
    return asked or not torch.accelerator.is_available()


class Ranks:
    """The processes that train together; one alone works the same way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        together = distributed.is_initialized()
        self.index = distributed.get_rank() if together else 0
        self.count = distributed.get_world_size() if together else 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def broadcast(self, value: T) -> T:
        """The main process's value in all processes."""
        if self.count == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """All processes' values, in order, in all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        cast(Any, distributed).all_gather_object(values, value)
        return values

    def on_main(self, task: Callable[[], T]) -> T:
        """What the main process's ``task`` returns, in all processes; its error, too: where only
        one knew of it, the others would wait for it at their next meeting."""
        if self.count == 1:
            return task()
        result: Any = None
        failed: AnyStoryError | None = None
        if self.main:
            try:
                result = task()
            except AnyStoryError as error:
                failed = error
            except Exception:
                failed = AnyStoryError(traceback.format_exc())
        result, failed = self.broadcast((result, failed))
        if failed is not None:
            raise failed
        return result

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether a process has set it."""
        if self.count == 1:
            return flags
        wanted = torch.tensor(flags, dtype=torch.int32, device=self.device)
        distributed.all_reduce(wanted, distributed.ReduceOp.MAX)
        return tuple(bool(x) for x in wanted)

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean of each value () over all processes."""
        if not values:
            return {}
        stacked = torch.stack([x.detach().double() for x in values.values()]).to(self.device)
        if self.count > 1:
            distributed.all_reduce(stacked)
        return dict(zip(values, (float(x) / self.count for x in stacked), strict=True))

    def same(self, what: str, value: object, remedy: str) -> None:
        """ConfigError in every process, naming the first that differs from the main one, and of
        tables what differs."""
        values: list[Any] = self.gather(value)
        for index, own in enumerate(values):
            if own != values[0]:
                here, there = differing(own, values[0]), differing(values[0], own)
                raise ConfigError(
                    f"run: {what} of process {index}: {here}, of the main one: {there}; {remedy}"
                )


def differing(value: Any, other: Any) -> Any:
    """Of two tables, the entries of the first that the second has not; else the value itself."""
    if not (isinstance(value, dict) and isinstance(other, dict)):
        return cast(Any, value)
    table, compared = cast("dict[str, Any]", value), cast("dict[str, Any]", other)
    return {k: v for k, v in table.items() if k not in compared or compared[k] != v}
