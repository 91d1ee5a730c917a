"""What the pack costs on a GPU, and whether it is exact there: one run of at most eight minutes.

    COMFYUI_PATH=... python tests/benchmarks/gpu.py --out FOLDER
    COMFYUI_PATH=... python tests/benchmarks/gpu.py --out FOLDER --device cpu --small    a rehearsal

Random weights at SDXL's and FLUX's sizes; nothing is read from files. It needs torch, safetensors
and what a ComfyUI imports; packages of its own may lie in a folder that ``--packages`` names.
Parts run in the order of their worth, each on its own: one that fails is noted and the next begins,
and none begins after ``--limit`` seconds. The table is printed line by line; FOLDER/gpu.json is
written again after every part.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to rehearse")
    parser.add_argument("--limit", type=float, default=420, help="seconds; no part begins later")
    parser.add_argument("--packages", type=Path, help="a folder of Python packages")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {sorted(unknown)}, expected some of {list(PARTS)}")
    return given


@dataclasses.dataclass
class Machine:
    """Where it runs, and how sizes are cut for a rehearsal."""

    device: Any  # torch.device
    small: bool

    def wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """GiB since :meth:`free`."""
        import torch

        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0

    def seconds(self, ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Medians of all ways in turn, after two rounds that do not count."""
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 2):
            for name, way in ways.items():
                self.wait()
                start = time.perf_counter()
                way()
                self.wait()
                if number > 1:
                    taken[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in taken.items()}

    def bench(self, subjects: int, dtype: Any) -> Any:
        """SDXL with random weights and subjects; to rehearse, the mini model."""
        from speed import python_cost, setting

        if self.small:
            return python_cost.mini_bench(subjects)
        return setting.Bench.full_size(subjects, dtype)

    def config(self) -> Any:
        from speed import setting

        kind = setting.core("bases.sdxl.config").AnyStoryConfig
        return kind.mini() if self.small else kind.sdxl()


def ratios(seconds: dict[str, float], base: str = "plain") -> dict[str, str]:
    return {
        name: f"{1000 * value:.2f} ms, {value / seconds[base]:.4f}"
        for name, value in seconds.items()
    }


def sdxl(machine: Machine) -> dict[str, Any]:
    """1: a step plain, with N = 1 to 3, and of the IP-Adapter-style peer; launches and waits."""
    import torch
    from speed import times

    sizes = ((128, 128),) if machine.small else ((512, 512), (832, 1216), (1024, 1024))
    table: dict[str, Any] = {}
    for dtype in (torch.float32,) if machine.small else (torch.float16, torch.bfloat16):
        machine.free()
        bench = machine.bench(3, dtype)
        maps = times.adapter_maps(bench)
        models = {"plain": bench.unet.clone()}
        models |= {f"N = {n}": bench.patched(n) for n in (1, 2, 3)}
        models |= {f"peer, N = {n}": times.adapter(bench, n, maps) for n in (1, 3)}
        for size in sizes:
            row: dict[str, Any] = {}

            def use(steps: dict[str, Any], row: dict[str, Any] = row) -> None:
                found = machine.seconds(steps, 3 if machine.small else 7)
                row.update(ratios(found))
                row["N = 3 / N = 1"] = f"{found['N = 3'] / found['N = 1']:.4f}"
                for name in ("plain", "N = 1", "N = 3"):
                    row[f"launches, waits: {name}"] = calls(machine, steps[name])

            bench.with_steps(models, size, use)
            table[f"{dtype} {size[0]}x{size[1]}"] = row
    return table


def calls(machine: Machine, step: Callable[[], Any]) -> str:
    """Kernel launches and host synchronisations of one step."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    if machine.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    machine.wait()
    with profile(activities=kinds) as profiler:
        step()
    counts = {event.key: event.count for event in profiler.key_averages()}
    return ", ".join(str(sum(counts.get(name, 0) for name in of)) for of in (LAUNCHES, WAITS))


def compiled(machine: Machine) -> dict[str, Any]:
    """1: the same with the host's torch.compile, and what compiling takes."""
    import torch
    from speed import setting

    wrap = setting.host("comfy_api.torch_helpers").set_torch_compile_wrapper
    bench = machine.bench(2, torch.float16)
    table: dict[str, Any] = {}
    models = {"plain": bench.unet.clone(), "N = 2": bench.patched(2)}
    for name in tuple(models):
        models[f"{name}, compiled"] = models[name].clone()
        wrap(model=models[f"{name}, compiled"], backend="eager" if machine.small else "inductor")

    def use(steps: dict[str, Any]) -> None:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            machine.wait()
            table[f"first step: {name}"] = f"{time.perf_counter() - start:.1f} s"
        found = machine.seconds(steps, 5)
        table.update(ratios(found))
        both = found["N = 2, compiled"] / found["plain, compiled"]
        table["compiled N = 2 / compiled plain"] = f"{both:.4f}"

    bench.with_steps(models, (128, 128) if machine.small else (1024, 1024), use)
    return table


def reference_net(machine: Machine) -> dict[str, Any]:
    """2: a 64x64 latent through the ReferenceNet as built, over the original with
    cross-attention (the paper's Table 1: 53.2 / 62.0 ms = 0.858)."""
    import torch
    from speed import setting

    config = machine.config()
    dtype = torch.float32 if machine.small else torch.float16
    make = setting.core("bases.sdxl.reference_net").ReferenceNet
    crossed = dataclasses.replace(config.reference, cross_attention=True)
    graphs = {
        "original": (dataclasses.replace(config, reference=crossed), True),
        "simplified, full graph": (config, True),
        "simplified, as built": (config, False),
    }
    side = config.reference.size // config.reference.latent_stride
    place: dict[str, Any] = {"dtype": dtype, "device": machine.device}
    latents = torch.randn(1, config.unet.in_channels + 1, side, side, **place)
    context = torch.randn(1, 77, config.unet.context_dim, **place)
    ways: dict[str, Callable[[], Any]] = {}
    for name, (of, full) in graphs.items():
        net = make(of, full=full, **place)
        setting.fill(net, 3)
        text = context if name == "original" else None
        ways[name] = lambda net=net, text=text: net(latents, text)
    return ratios(machine.seconds(ways, 10), "original")


def memory(machine: Machine) -> dict[str, Any]:
    """3: the most that is allocated while two subjects are sampled at 1024x1024 (counted: 5.92 GiB,
    of which 0.47 where a kernel copies the mask for each head)."""
    import torch

    bench = machine.bench(2, torch.float16)
    # While sampling, projections and routers are off the device; here they never go there.
    table: dict[str, Any] = {}
    ours = sum(p.nbytes for _, m in bench.anystory.model.modules() for p in m.parameters())
    size = (128, 128) if machine.small else (1024, 1024)
    for name, model in {"plain": bench.unet.clone(), "N = 2": bench.patched(2)}.items():

        def use(steps: dict[str, Any], name: str = name) -> None:
            machine.free()
            for step in steps.values():
                step()
            table[name] = f"{machine.peak():.3f} GiB"

        bench.with_steps({name: model}, size, use)
    table["weights of AnyStory, which a host takes off the device"] = f"{ours / 2**30:.3f} GiB"
    return table


def exact(machine: Machine) -> dict[str, Any]:
    """4: both equations by mask, and by region where they run, against float64; rows without a key
    of their own; scores that overflow half precision; routes against the CPU's."""
    import torch
    from speed import setting

    equations, keys = setting.core("injection.equations"), setting.core("injection.keys")
    attention = setting.host("nodes.host.sdxl.patcher").RoutedAttention({})
    router = setting.core("routing.router").Router
    make = torch.Generator().manual_seed(0)
    heads, width, tokens, subjects = 10, 640, 1024, 3
    table: dict[str, Any] = {}

    def dense(q: Any, k: Any, v: Any, *, mask: Any = None) -> Any:
        split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        scores = split[0] @ split[1].transpose(-1, -2) / (width / heads) ** 0.5
        if mask is not None:
            scores = scores + mask[:, None]
        return (scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)

    def fast(q: Any, k: Any, v: Any, *, mask: Any = None) -> Any:
        return attention(q, k, v, heads, mask)

    kinds = (torch.float32,) if machine.small else (torch.float16, torch.bfloat16)
    for dtype in kinds:
        for loud in (1.0, 60.0):  # 60: a softmax in half precision would overflow

            def normal(*shape: int, dtype: Any = dtype) -> Any:
                return torch.randn(*shape, generator=make).to(machine.device, dtype)

            q, k, v = (
                loud * normal(2, tokens, width),
                normal(2, tokens, width),
                normal(2, tokens, width),
            )
            parts = [
                keys.KeyValue(normal(1, 256, width), normal(1, 256, width)) for _ in range(subjects)
            ]
            route = torch.randint(0, subjects + 1, (2, tokens), generator=make).to(machine.device)
            gamma = (0.0, 0.5, -float("inf"), -float("inf"))  # subject 3 and background: own keys
            results = []
            for kind, attend in ((dtype, fast), (torch.float64, dense)):
                given = [keys.KeyValue(p.k.to(kind), p.v.to(kind)) for p in parts]
                own = keys.KeyValue(k.to(kind), v.to(kind))
                clip = keys.Candidates([*given, None])
                results.append(
                    (
                        equations.clip_masked(
                            q.to(kind), clip, (1.0, 0.5, 1.0, 1.0), route, attend
                        ),
                        equations.reference_masked(
                            q.to(kind), own, keys.Candidates([*given, None]), gamma, route, attend
                        ),
                    )
                )
            for name, one, other in zip(("Eq. 5", "Eq. 6-8"), *results, strict=True):
                error = float((one.double() - other).abs().max() / other.abs().max())
                table[f"{name}, {dtype}, scores x {loud:g}"] = f"relative error {error:.2e}"
    config = machine.config()
    dtype = kinds[0]
    module = router(config.router, width=width, routing_dim=config.routing_dim, dtype=dtype)
    setting.fill(module, 1)
    routing = torch.randn(1, subjects + 1, config.routing_dim, generator=make).to(dtype)
    z = torch.randn(2, tokens, width, generator=make).to(dtype)
    found = []
    for device in ("cpu", machine.device):
        module.to(device)
        logits = module.prepare(routing.to(device)).logits(z.to(device)).refined
        found.append(logits.argmax(dim=1).cpu())
    table["routes as on the CPU"] = f"{float((found[0] == found[1]).float().mean()):.5f} of tokens"
    return table


def training(machine: Machine) -> dict[str, Any]:
    """5: optimiser steps of both stages. Needs diffusers, transformers and accelerate."""
    import bench_training as training

    table: dict[str, Any] = {}
    for stage in ("subject", "router"):
        machine.free()
        rows, side = (2, 128) if machine.small else (8, 1024)
        row = training.measure(
            machine.config(), stage, rows=rows, side=side, steps=3,
            checkpointing=not machine.small, device=machine.device,
        )  # fmt: skip
        row["peak memory on the device (GiB)"] = round(machine.peak(), 2)
        table[stage] = row
    return table


def flux(machine: Machine) -> dict[str, Any]:
    """6: a step of FLUX, N = 0, 1, 2, against the released way."""
    import bench_flux
    import torch

    blocks = (1, 1) if machine.small else (19, 38)
    setting = bench_flux.Setting(blocks, str(machine.device))
    table: dict[str, Any] = {}
    with torch.inference_mode():
        references = {count: setting.references(count) for count in (1, 2)}
        full = setting.full(references[2])
        for side in (256,) if machine.small else (512, 1024):
            ways: dict[str, Callable[[], Any]] = {
                "plain": lambda side=side: setting.step(side, 0, None),
                "N = 1": lambda side=side: setting.step(side, 1, references[1]),
                "N = 2": lambda side=side: setting.step(side, 2, references[2]),
                "N = 2, 4 of 5 steps": lambda side=side: setting.step(
                    side, 2, references[2], told=False
                ),
            }
            found = machine.seconds(ways, 2 if machine.small else 5)
            handles = bench_flux.always_on(setting.net, setting.model)
            released = {
                "N = 2, released": lambda side=side: setting.step(
                    side, 2, full, bench_flux.ReleasedCall
                )
            }
            found |= machine.seconds(released, 2 if machine.small else 5)
            for handle in handles:
                handle.remove()
            table[f"{side}x{side}"] = ratios(found)
    return table


PARTS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    "exact": exact,
    "sdxl": sdxl,
    "memory": memory,
    "reference_net": reference_net,
    "flux": flux,
    "training": training,
    "compiled": compiled,
}


def main() -> None:
    """Every part that time allows."""
    given = arguments()
    begun = time.monotonic()
    if given.packages is not None:
        sys.path.append(str(given.packages))
    import torch

    given.out.mkdir(parents=True, exist_ok=True)
    machine = Machine(torch.device(given.device), given.small)
    name = platform.processor()
    if machine.device.type == "cuda":
        name = torch.cuda.get_device_name()
    figures: dict[str, Any] = {
        "machine": {"name": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    }
    from speed import setting

    setting.start_host(gpu=machine.device.type == "cuda")
    for part in given.parts or PARTS:
        if time.monotonic() - begun > given.limit:
            figures[part] = {"left out": "no time was left"}
            continue
        start = time.monotonic()
        try:
            # A step of training needs gradients, which inference would not keep.
            with contextlib.nullcontext() if part == "training" else torch.no_grad():
                figures[part] = PARTS[part](machine)
        except Exception as error:  # the other parts are worth having
            figures[part] = {"failed": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        machine.free()
        figures[part]["seconds"] = round(time.monotonic() - start, 1)
        print(json.dumps({part: figures[part]}, indent=2, default=str), flush=True)
        (given.out / "gpu.json").write_text(json.dumps(figures, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
