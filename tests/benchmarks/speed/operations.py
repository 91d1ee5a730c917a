"""Floating-point operations of a step, counted in a run of the real code."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .setting import Bench, Step

SIZES = ((512, 512), (832, 1216), (1024, 1024))
aten = torch.ops.aten


class WithoutProducts(TorchDispatchMode):
    """Matrix products and convolutions give zeros of the right shape; all else runs as it is.

    With fixed routes no shape depends on a value, so a count under this mode is the count of the
    whole run, in a fraction of the time; :func:`measure` holds the two together at 512².
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket
        if name is aten.mm:
            return args[0].new_zeros(args[0].shape[0], args[1].shape[1])
        if name is aten.addmm:
            return args[1].new_zeros(args[1].shape[0], args[2].shape[1])
        if name in (aten.bmm, aten.baddbmm):
            left, right = args[-2:] if name is aten.bmm else args[1:3]
            return left.new_zeros(left.shape[0], left.shape[1], right.shape[2])
        if name is aten.convolution:
            x, weight, _, stride, padding = args[:5]
            sides = [
                (s + 2 * p - k) // t + 1
                for s, p, k, t in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
            ]
            return x.new_zeros(x.shape[0], weight.shape[0], *sides)
        return func(*args, **(kwargs or {}))


def count(step: Step, *, skip: bool) -> int:
    """Operations of one step; ``skip`` leaves the products out and counts them all the same."""
    counter = FlopCounterMode(display=False)
    if skip:
        with WithoutProducts(), counter:
            step()
    else:
        with counter:
            step()
    return counter.get_total_flops()


def measure(bench: Bench, sizes: tuple[tuple[int, int], ...] = SIZES) -> dict[str, Any]:
    """Operations of the plain step and of N = 1..4 at each size, in tera."""
    models = {"plain": bench.unet.clone()}
    models |= {str(n): bench.patched(n) for n in range(1, len(bench.subjects) + 1)}
    table: dict[str, Any] = {}
    for size in sizes:

        def use(steps: dict[str, Step], size: tuple[int, int] = size) -> None:
            row = {name: count(step, skip=True) for name, step in steps.items()}
            if size == sizes[0]:
                for name in ("plain", "3"):
                    whole = count(steps[name], skip=False)
                    if whole != row[name]:
                        raise SystemExit(f"{name}: {whole} in a whole run, {row[name]} counted")
            table[f"{size[0]}x{size[1]}"] = {
                **{name: value / 1e12 for name, value in row.items()},
                **{f"{n} / plain": row[n] / row["plain"] for n in row if n != "plain"},
                "3 / 1": row["3"] / row["1"],
            }

        bench.with_steps(models, size, use)
    return table


def paths(bench: Bench, size: tuple[int, int] = (1024, 1024)) -> dict[str, Any]:
    """Operations of N = 3 over the plain step for each way of computation."""
    from .setting import core

    conditioner = core("conditioner")
    models = {"plain": bench.unet.clone(), "3": bench.patched(3)}
    table: dict[str, Any] = {}

    def use(steps: dict[str, Step]) -> None:
        plain = count(steps["plain"], skip=True)
        chosen = conditioner.by_region
        try:
            for name, answer in (("by region", True), ("masked", False)):
                conditioner.by_region = lambda _, answer=answer: answer
                table[name] = count(steps["3"], skip=True) / plain
        finally:
            conditioner.by_region = chosen

    bench.with_steps(models, size, use)
    return table
