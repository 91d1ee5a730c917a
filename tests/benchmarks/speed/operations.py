"""Floating-point operations of a step, counted in a run of the real code."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .setting import Bench, Step, core

SIZES = ((512, 512), (832, 1216), (1024, 1024))
CHECKED = (256, 256)
aten = torch.ops.aten


class WithoutProducts(TorchDispatchMode):
    """Leaves out what takes time: matrix products, convolutions, attention, norms, activations.
    Their results have the right shape and any values.

    With fixed routes no shape depends on a value, so a count under this mode is the count of the
    whole run, in a fraction of the time; :func:`measure` holds the two together at 256².
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket
        if name in (aten._softmax, aten.gelu, aten.silu):
            return torch.empty_like(args[0])
        if name in (aten.native_layer_norm, aten.native_group_norm):
            return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
        if name is aten.mm:
            return args[0].new_empty(args[0].shape[0], args[1].shape[1])
        if name is aten.addmm:
            return args[1].new_empty(args[1].shape[0], args[2].shape[1])
        if name in (aten.bmm, aten.baddbmm):
            left, right = args[-2:] if name is aten.bmm else args[1:3]
            return left.new_empty(left.shape[0], left.shape[1], right.shape[2])
        if name is aten.convolution:
            x, weight, _, stride, padding = args[:5]
            sides = [
                (s + 2 * p - k) // t + 1
                for s, p, k, t in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
            ]
            return x.new_empty(x.shape[0], weight.shape[0], *sides)
        if name is aten._scaled_dot_product_flash_attention_for_cpu:
            batch, heads, tokens, width = args[0].shape
            out = args[2].new_empty(batch, tokens, heads, width).transpose(1, 2)
            return out, out.new_empty(batch, heads, tokens, dtype=torch.float32)
        return func(*args, **(kwargs or {}))


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def count(step: Step, *, skip: bool) -> int:
    """Operations of one step; ``skip`` leaves the products out and counts them all the same."""
    # The counter does not know the processor's fused attention.
    own = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    counter = FlopCounterMode(display=False, custom_mapping=own)
    if skip:
        with WithoutProducts(), counter:
            step()
    else:
        with counter:
            step()
    return counter.get_total_flops()


def measure(bench: Bench) -> dict[str, Any]:
    """Operations of the plain step and of N = 1..4 at each size, in tera."""
    models = {"plain": bench.unet.clone()}
    for n in range(1, len(bench.subjects) + 1):
        models[str(n)] = bench.patched(n, preparing=WithoutProducts)
    table: dict[str, Any] = {}
    bench.with_steps(models, CHECKED, _check)
    for size in SIZES:

        def use(steps: dict[str, Step], size: tuple[int, int] = size) -> None:
            row = {name: count(step, skip=True) for name, step in steps.items()}
            table[f"{size[0]}x{size[1]}"] = {
                **{name: value / 1e12 for name, value in row.items()},
                **{f"{n} / plain": row[n] / row["plain"] for n in row if n != "plain"},
                "3 / 1": row["3"] / row["1"],
            }

        bench.with_steps(models, size, use)
    return table


def _check(steps: dict[str, Step]) -> None:
    for name in ("plain", "3"):
        whole, counted = (count(steps[name], skip=skip) for skip in (False, True))
        if whole != counted:
            raise SystemExit(f"{name}: {whole} operations in a whole run, {counted} without it")


def paths(bench: Bench, size: tuple[int, int] = (1024, 1024)) -> dict[str, Any]:
    """Operations over the plain step for each way of computation, N = 1 and 3."""
    conditioner = core("injection.call")
    models = {"plain": bench.unet.clone()}
    models |= {f"N = {n}": bench.patched(n, preparing=WithoutProducts) for n in (1, 3)}
    table: dict[str, Any] = {}

    def use(steps: dict[str, Step]) -> None:
        plain = count(steps.pop("plain"), skip=True)
        for name, answer in (("by region", True), ("masked", False)):
            with mock.patch.object(conditioner, "by_region", lambda q, answer=answer: answer):
                table[name] = {n: count(step, skip=True) / plain for n, step in steps.items()}

    bench.with_steps(models, size, use)
    return table
