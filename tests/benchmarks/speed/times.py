"""Seconds of a step: every variant in turn, again and again, in one process.

The machine may be shared, so ratios are of medians in one interleaved run, and the processor time
of the step, which has one thread, stands beside the wall time: it does not see who else is running.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .operations import count
from .setting import DTYPE, Bench, Step, core, fill, host

Clock = Callable[[], float]


def interleave(
    steps: dict[str, Callable[[], Any]], repetitions: int
) -> dict[str, dict[str, list[float]]]:
    """One warm-up round, then ``repetitions`` rounds over all; the order turns each round."""
    names = list(steps)
    for step in steps.values():
        step()
    taken = {name: {"wall": list[float](), "cpu": list[float]()} for name in names}
    for number in range(repetitions):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            taken[name]["cpu"].append(time.process_time() - cpu)
            taken[name]["wall"].append(time.perf_counter() - wall)
    return taken


def summary(taken: dict[str, dict[str, list[float]]], base: str) -> dict[str, Any]:
    """Medians in seconds, and their ratios to ``base``."""
    medians = {
        name: {clock: statistics.median(values) for clock, values in clocks.items()}
        for name, clocks in taken.items()
    }
    out: dict[str, Any] = {"repetitions": len(taken[base]["wall"])}
    for name, clocks in medians.items():
        out[name] = {
            **{f"{clock} s": round(value, 3) for clock, value in clocks.items()},
            **{f"{clock} ratio": value / medians[base][clock] for clock, value in clocks.items()},
        }
    if "1" in medians and "3" in medians:
        out["3 / 1"] = {
            clock: medians["3"][clock] / medians["1"][clock] for clock in ("wall", "cpu")
        }
    return out


def measure(
    bench: Bench,
    size: tuple[int, int],
    repetitions: int,
    *,
    counts: tuple[int, ...] = (1, 2, 3),
    peer: bool = True,
) -> dict[str, Any]:
    """Plain, each number of subjects, and the IP-Adapter-style peer at N = 1 and 3."""
    models = {"plain": bench.unet.clone()}
    models |= {str(n): bench.patched(n) for n in counts}
    if peer:
        maps = adapter_maps(bench)
        models |= {f"peer {n}": adapter(bench, n, maps) for n in (1, 3)}
    result: dict[str, Any] = {}

    def use(steps: dict[str, Step]) -> None:
        result.update(summary(interleave(steps, repetitions), "plain"))

    bench.with_steps(models, size, use)
    result["start of a run, cpu s"] = {
        str(n): round(min(seconds), 2) for n, seconds in sorted(bench.seconds.items())
    }
    return result


PEER_TOKENS = 16


def adapter_maps(bench: Bench) -> dict[tuple[str, int, int], tuple[Tensor, Tensor]]:
    """Random key and value maps of one adapter, by block."""
    make = torch.Generator().manual_seed(17)
    width = bench.anystory.model.config.unet.context_dim
    maps = {}
    for site in bench.anystory.model.sites:
        pair = torch.empty(2, site.channels, width)
        pair.uniform_(-(width**-0.5), width**-0.5, generator=make)
        pair = pair.to(bench.subjects[0].tokens.dtype).to(bench.unet.load_device)
        maps[site.part, site.number, site.block_index] = (pair[0], pair[1])
    return maps


def adapter(bench: Bench, subjects: int, maps: Any) -> Any:
    """A decoupled cross-attention as its public nodes do it: one patch per block, in which every
    subject's 16 tokens are projected at every step, attended to by all tokens of all rows, and
    multiplied by the subject's mask (stripes; unconditional rows see the zero picture's tokens)."""
    attention = host("comfy.ldm.modules.attention").optimized_attention
    make = torch.Generator().manual_seed(18)
    width = bench.anystory.model.config.unet.context_dim
    like = next(iter(maps.values()))[0]
    tokens = [torch.randn(2, PEER_TOKENS, width, generator=make).to(like) for _ in range(subjects)]
    masks: dict[tuple[int, int], list[Tensor]] = {}

    def mask(place: int, height: int, columns: int) -> Tensor:
        if (height, columns) not in masks:
            column = torch.arange(columns)[None].expand(height, columns)
            share = [column * subjects // columns == i for i in range(subjects)]
            masks[height, columns] = [s.flatten()[None, :, None].to(like) for s in share]
        return masks[height, columns][place]

    def patch(key: tuple[str, int, int]) -> Any:
        to_k, to_v = maps[key]

        def replace(q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
            out = attention(q, k, v, options["n_heads"])
            _, _, height, columns = options["activations_shape"]
            rows = torch.tensor(options["cond_or_uncond"]).repeat_interleave(
                q.shape[0] // len(options["cond_or_uncond"])
            )
            for place, of_subject in enumerate(tokens):
                states = of_subject[rows]
                own_k = torch.nn.functional.linear(states, to_k)
                own_v = torch.nn.functional.linear(states, to_v)
                added = attention(q, own_k, own_v, options["n_heads"])
                out = out + added * mask(place, height, columns)
            return out

        return replace

    model = bench.unet.clone()
    for key in maps:
        model.set_model_attn2_replace(patch(key), *key)
    return model


def reference_net(repetitions: int) -> dict[str, Any]:
    """One picture's pass (64x64 latent) against the original graph with cross-attention.

    All share one set of weights: the simplified graph's are part of the original's."""
    config = core("bases.sdxl.config").AnyStoryConfig.sdxl()
    crossed = dataclasses.replace(config.reference, cross_attention=True)
    graphs = {
        "original": (dataclasses.replace(config, reference=crossed), True),
        "simplified, full graph": (config, True),
        "simplified, as built": (config, False),
    }
    make = core("bases.sdxl.reference_net").ReferenceNet
    nets = {
        name: make(of, full=full, dtype=DTYPE, device="meta") for name, (of, full) in graphs.items()
    }
    seeded = torch.Generator().manual_seed(4)
    side = config.reference.size // config.reference.latent_stride
    latents = torch.randn(1, config.unet.in_channels + 1, side, side, generator=seeded).to(DTYPE)
    context = torch.randn(1, 77, config.unet.context_dim, generator=seeded).to(DTYPE)

    def run(name: str, device: str) -> Any:
        text = context.to(device) if name == "original" else None
        return nets[name](latents.to(device), text)

    # Counted without values: the CPU's fused attention is an operator that the counter leaves out.
    tera = {name: count(lambda name=name: run(name, "meta"), skip=False) / 1e12 for name in nets}
    nets["original"].to_empty(device="cpu")
    fill(nets["original"], 3)
    state = nets["original"].state_dict()
    for net in nets.values():
        own = {key: state[key] for key in net.state_dict()}
        net.load_state_dict(own, strict=True, assign=True)
        net.requires_grad_(False)
    passes = {name: (lambda name=name: run(name, "cpu")) for name in nets}
    with torch.no_grad():
        out = summary(interleave(passes, repetitions), "original")
    for name, net in nets.items():
        parameters = sum(p.numel() for p in net.parameters())
        out[name] |= {"billion parameters": parameters / 1e9, "tera operations": tera[name]}
    return out
