"""AnyStory on FLUX: operations, seconds and bytes, beside the plain model and the released way.

    python3 dev.py bench flux                    operations, and seconds at 2 + 4 blocks
    python3 dev.py bench flux --count            operations alone
    python3 dev.py bench flux --blocks 1 2 --side 512

Operations are counted on the meta device, for masks and routes that are half of the picture each
(so half of a subject's places for concepts are empty), at one double and two single blocks: a
nineteenth of FLUX. Seconds are processor time of one thread, the ways in turn, and ratios are
within a round. "released" is the same maths as the authors' code does it: every query attends to
all references through one dense mask, and both adapters' low-rank branches run on every stream at
scale 0, as peft leaves them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import flux_net
import torch
from speed.setting import keep_memory
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anystory_core.bases.flux import attention as ways
from anystory_core.bases.flux.attention import Given, Layout
from anystory_core.bases.flux.call import Concepts, FluxCall, RowGroup
from anystory_core.bases.flux.config import FluxConfig
from anystory_core.bases.flux.model import FluxModel, build_model
from anystory_core.bases.flux.reference import HeadKeys, References, reference_pass
from anystory_core.bases.flux.router import Router

TEXT = 512
flux_net.AXES, flux_net.POOLED = (16, 56, 56), 768  # FLUX.1's


class ReleasedCall(FluxCall):
    """Main attention over all references of all subjects, closed by one dense mask per head."""

    def _routed(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, references: Any, ids: Any, mask: Any
    ) -> Tensor:
        none: list[HeadKeys | None] = [None] * len(self.biases)
        given = Given.of(none if references is None else references.blocks[index - 1], self.biases)
        keys = given.joined(k, self.layout, values=False)
        values = given.joined(v, self.layout, values=True)
        dense = q.new_zeros(q.shape[0], q.shape[1], q.shape[2], keys.shape[2])
        if ids is not None:
            allowed = ways._allowed(given, ids, self.layout, q.device)
            dense = dense.masked_fill(~allowed, -100.0)
        return self.attention(q, keys, values, dense)


def always_on(net: nn.Module, model: FluxModel) -> list[Any]:
    """Both adapters' branches behind every layer that has them, at scale 0, as peft leaves them."""
    handles: list[Any] = []
    reference, router = model.reference_branches, model.router_branches
    assert reference is not None and router is not None
    pairs = [(net.img_in, reference.input), (net.txt_in, router.input)]
    for block, image, text in zip(
        net.double_blocks, reference.double_blocks, router.double_blocks, strict=True
    ):
        for side, own in (("img", image), ("txt", text)):
            pairs += [
                (getattr(block, f"{side}_mod").lin, own.modulation),
                (getattr(block, f"{side}_attn").qkv, own.qkv),
                (getattr(block, f"{side}_attn").proj, own.proj),
                (getattr(block, f"{side}_mlp")[2], own.mlp),
            ]
    for block, *streams in zip(
        net.single_blocks, reference.single_blocks, router.single_blocks, strict=True
    ):
        for own in streams:
            pairs += [
                (block.modulation.lin, own.modulation),
                (block.linear1, own.linear1),
                (block.linear2, own.linear2),
            ]
    for layer, branch in pairs:
        handles.append(
            layer.register_forward_hook(lambda _, x, out, b=branch: out.add_(b(x[0]), alpha=0))
        )
    return handles


class Setting:
    """One FLUX with so many blocks on a device, and its calls."""

    def __init__(self, blocks: tuple[int, int], device: str) -> None:
        base = FluxConfig()
        sizes = dataclasses.replace(
            base.transformer, double_blocks=blocks[0], single_blocks=blocks[1]
        )
        self.config = dataclasses.replace(base, transformer=sizes)
        self.kw: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        with torch.device(device):
            self.net = flux_net.Net(sizes).to(torch.bfloat16).requires_grad_(False)
            self.model = build_model(self.config, dtype=torch.bfloat16, device=device)
        for _, module in self.model.modules():
            module.requires_grad_(False)
        if device != "meta":
            for module in (self.net, *(m for _, m in self.model.modules())):
                for p in module.parameters():
                    p.normal_(std=0.02) if p.ndim > 1 else p.fill_(0.01)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, **self.kw)

    def references(self, count: int) -> References:
        grid = self.config.reference_grid
        keep = torch.zeros(1, grid * grid, dtype=torch.bool)
        keep[:, : grid * grid // 2] = True  # the mask covers half of each picture
        if self.kw["device"] == "meta":
            sizes = self.config.transformer
            shape = 1, sizes.heads, grid * grid // 2, sizes.head_dim
            one = HeadKeys(self.random(*shape), self.random(*shape))
            depth = sizes.double_blocks + sizes.single_blocks
            return References(((one,) * count,) * depth)
        return self.reference_pass(count, keep)

    def reference_pass(self, count: int, keep: Tensor) -> References:
        assert self.model.reference_branches is not None
        side = 2 * self.config.reference_grid
        channels = self.config.transformer.channels
        return reference_pass(
            self.net,
            self.model.reference_branches,
            [self.random(1, channels, side, side)] * count,
            [keep] * count,
            guidance=torch.full((1,), 3.5, device=self.kw["device"]),
            pooled=self.random(1, flux_net.POOLED),
            like=self.random(1),
            attention=flux_net.attention,
        )

    def full(self, references: References) -> References:
        """All tokens of every picture, as the released code keeps them."""
        twice = {
            id(x): HeadKeys(torch.cat((x.k, x.k), 2), torch.cat((x.v, x.v), 2))
            for block in references.blocks
            for x in block
            if x is not None
        }
        return References(
            tuple(
                tuple(twice[id(x)] for x in block if x is not None) for block in references.blocks
            )
        )

    def step(
        self,
        side: int,
        count: int,
        references: References | None,
        kind: type[FluxCall] = FluxCall,
        *,
        told: bool = True,
    ) -> Tensor:
        """One pass at side x side pixels with ``count`` subjects; ``told``: with their tokens in
        the text, as in one of five steps."""
        grid = side // 16, side // 16
        context = self.random(1, TEXT, self.config.transformer.context_dim)
        call = None
        if count:
            redux = self.config.redux
            width = self.config.transformer.context_dim
            empty = 0 if kind is ReleasedCall else redux.subject_tokens // 2  # as the mask
            shape = redux.subject_tokens - max(0, empty - 1), width
            own = tuple(self.random(*shape) for _ in range(count))
            again = (max(0, empty - 1),) * count
            concepts = Concepts(own, again) if told else Concepts((None,) * count, (0,) * count)
            router = None
            if count > 1:
                assert self.model.router_branches and self.model.routing_maps
                lengths = (redux.routing_tokens,) * count
                tokens = self.random(1, sum(lengths), width)
                router = Router(
                    self.model.router_branches, self.model.routing_maps, tokens, lengths
                )
            call = kind(
                self.model.sites,
                Layout(TEXT, concepts.lengths, grid, concepts.repeats),
                (RowGroup((0,), True, references),),
                (0.0,) * count,
                flux_net.attention,
                flux_net.attention,
                router=router,
            )
            call.enter(self.net, context)
            context = concepts.behind(context)
        return self.net(
            self.random(1, grid[0] * grid[1], self.config.transformer.token_width),
            grid,
            torch.full((1,), 0.5, device=self.kw["device"]),
            context,
            self.random(1, flux_net.POOLED),
            torch.full((1,), 3.5, device=self.kw["device"]),
            call,
        )


def halves(ids: Tensor, regions: int) -> list[list[int]]:
    """Region sizes where nothing can be read: equal shares for all subjects."""
    share = ids.shape[1] // (regions - 1)
    return [[share] * (regions - 2) + [ids.shape[1] - share * (regions - 2), 0]]


def counted(function: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.device("meta"):
        function()
    return FluxConfig().transformer.double_blocks * counter.get_total_flops() / 1e12


def count_operations() -> dict[str, Any]:
    """Tera-operations of one pass at full depth: nineteen times what is counted."""
    setting = Setting((1, 2), "meta")
    ways._sizes = halves  # type: ignore[assignment]
    rows: dict[str, Any] = {}
    for side in (512, 1024):
        plain = counted(lambda side=side: setting.step(side, 0, None))
        rows[f"{side} plain"] = {"tera": plain, "of plain": 1.0}
        for count in (1, 2, 4):
            references = setting.references(count)
            ours = counted(lambda s=side, c=count, r=references: setting.step(s, c, r))
            handles = always_on(setting.net, setting.model)
            full = setting.full(references)
            theirs = counted(lambda s=side, c=count, r=full: setting.step(s, c, r, ReleasedCall))
            for handle in handles:
                handle.remove()
            quiet = counted(lambda s=side, c=count, r=references: setting.step(s, c, r, told=False))
            rows[f"{side} N={count} ours"] = {"tera": ours, "of plain": ours / plain}
            rows[f"{side} N={count} ours, 4 of 5 steps"] = {
                "tera": quiet,
                "of plain": quiet / plain,
            }
            rows[f"{side} N={count} released"] = {"tera": theirs, "of plain": theirs / plain}
            # Of the authors' 25 steps five have the concepts, with two subjects two have nothing.
            idle = 2 if count > 1 else 0
            mean = (5 * ours + (20 - idle) * quiet + idle * plain) / 25 / plain
            rows[f"{side} N={count} ours, mean of 25 steps"] = {
                "tera": mean * plain,
                "of plain": mean,
            }
    return rows


def seconds(blocks: tuple[int, int], sides: list[int], rounds: int) -> dict[str, Any]:
    """Medians of one pass on the CPU in bfloat16, the ways in turn."""
    torch.set_num_threads(1)
    keep_memory()
    setting = Setting(blocks, "cpu")
    grid = setting.config.reference_grid
    keep = torch.zeros(1, grid * grid, dtype=torch.bool)
    keep[:, : grid * grid // 2] = True
    rows: dict[str, Any] = {}
    with torch.inference_mode():
        references = {count: setting.references(count) for count in (1, 2)}
        rows["bytes of keys and values, one picture"] = references[1].size
        for side in sides:
            kinds: dict[str, Callable[[], object]] = {
                "plain": lambda side=side: setting.step(side, 0, None),
                "N=1 ours": lambda side=side: setting.step(side, 1, references[1]),
                "N=2 ours": lambda side=side: setting.step(side, 2, references[2]),
                "N=2 ours, 4 of 5 steps": lambda side=side: setting.step(
                    side, 2, references[2], told=False
                ),
            }
            if side == sides[0]:
                kinds["reference pass"] = lambda: setting.reference_pass(1, keep)
            taken: dict[str, list[float]] = {name: [] for name in (*kinds, "N=2 released")}
            full = setting.full(references[2])
            for _ in range(rounds):
                for name, run in kinds.items():
                    begun = time.process_time()
                    run()
                    taken[name].append(time.process_time() - begun)
                handles = always_on(setting.net, setting.model)
                begun = time.process_time()
                setting.step(side, 2, full, ReleasedCall)
                taken["N=2 released"].append(time.process_time() - begun)
                for handle in handles:
                    handle.remove()
            plain = taken["plain"]
            for name, times in taken.items():
                ratios = [a / b for a, b in zip(times, plain, strict=True)]
                rows[f"{side} {name}"] = {
                    "seconds": statistics.median(times),
                    "over plain": statistics.median(ratios),
                }
    return rows


def main() -> None:
    """Print the tables as text, then as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", action="store_true", help="operations alone")
    parser.add_argument("--blocks", type=int, nargs=2, default=(2, 4), help="double and single")
    parser.add_argument("--side", type=int, nargs="+", default=[512, 1024], help="pixels")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    rows = {} if given.count else seconds(tuple(given.blocks), given.side, given.rounds)
    for name, row in count_operations().items():
        rows.setdefault(name, {}).update(row)
    for name, row in rows.items():
        text = row if isinstance(row, int) else "  ".join(f"{k} {v:.3f}" for k, v in row.items())
        print(f"{name:40} {text}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
