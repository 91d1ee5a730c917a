"""Full-size conversion from random files of the real shapes: time, memory, size; then one step.

    python tests/benchmarks/bench_convert.py --folder /tmp --step

Writes about 6 GB of inputs and 5 GB of output into a temporary folder inside ``--folder`` and
removes it. ``--kind`` makes MIP-Adapter's or MS-Diffusion's file instead of IP-Adapter Plus', as
the pickles that they are, and ``--reference-net none`` does without a U-Net. The conversion runs
in a process of its own, whose memory is read from the system: "anonymous" is what it holds itself,
"all" also counts pages of the mapped inputs. ``--step`` then loads the file, encodes two subjects
and draws two steps at 512x512 through the nodes with a random SDXL U-Net: about 11 GB of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from anystory_core.bases.sdxl.config import AnyStoryConfig  # noqa: E402
from anystory_core.bases.sdxl.names import LDM_PREFIX  # noqa: E402
from anystory_core.bases.sdxl.reference_net import ReferenceNet  # noqa: E402
from anystory_core.config import ClipBranchConfig, GroundingConfig  # noqa: E402
from anystory_core.weights.convert.adapters import (  # noqa: E402
    BIG_G,
    adapter_names,
    ms_diffusion_names,
)
from anystory_core.weights.convert.write import write_streaming  # noqa: E402
from anystory_core.weights.model import build_model  # noqa: E402

FILES = {  # kind -> name and number type of the public file
    "plus": ("plus.safetensors", torch.float16),
    "mip": ("model_sdxl_plus.bin", torch.float16),
    "ms": ("ms_adapter.bin", torch.float32),
}


def shapes_of_sdxl(config: AnyStoryConfig) -> dict[str, tuple[int, ...]]:
    """A single-file SDXL checkpoint's U-Net."""
    reference = dataclasses.replace(config.reference, cross_attention=True)
    whole = ReferenceNet(dataclasses.replace(config, reference=reference), full=True, device="meta")
    shapes = {LDM_PREFIX + k: tuple(v.shape) for k, v in whole.state_dict().items()}
    first = f"{LDM_PREFIX}input_blocks.0.0.weight"
    shapes[first] = (shapes[first][0], config.unet.in_channels, 3, 3)
    return shapes


def shapes_of_adapter(config: AnyStoryConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """An adapter of 16 queries under its public names."""
    qformer = dataclasses.replace(config.subject_qformer, queries=16)
    grounded = kind == "ms"
    branch = ClipBranchConfig(gate=kind == "mip", grounding=GroundingConfig() if grounded else None)
    clip = BIG_G if grounded else config.clip
    public = dataclasses.replace(config, subject_qformer=qformer, clip=clip, clip_branch=branch)
    names = ms_diffusion_names if grounded else adapter_names
    model = build_model(public, ("subject_encoder", "clip_projections"), device="meta")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("encoder.subject."):
            (key,) = names(name.removeprefix("encoder.subject."), None)
        else:
            _, _, index, leaf = name.split(".", 3)
            (key,) = names(leaf, model.sites[int(index) - 1])
        shapes[key] = tuple(tensor.shape)
    if grounded:
        shapes["dummy_image_tokens"] = (1, 4, config.unet.context_dim)
    return shapes


def write_random(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Weights whose size keeps activations finite; ``.bin``: by ``torch.save``, in groups."""
    make = torch.Generator().manual_seed(0)

    def tensor(name: str) -> Tensor:
        if len(shapes[name]) == 1:  # a norm's scale, or a bias
            scale = name.endswith(".weight")
            return torch.ones(shapes[name]) if scale else torch.zeros(shapes[name])
        fan = torch.Size(shapes[name][1:]).numel()
        return (torch.rand(shapes[name], generator=make) - 0.5) / fan**0.5

    if path.suffix == ".bin":
        groups: dict[str, Any] = {}
        for name in shapes:
            group, _, rest = name.partition(".")
            made = tensor(name).to(dtype)
            if rest:
                groups.setdefault(group, {})[rest] = made
            else:
                groups[group] = made
        torch.save(groups, path)
        return path.stat().st_size
    return write_streaming(
        path, shapes, tensor, dtype=dtype, metadata={"made": "random"}, origin=str
    )


def watch(process: subprocess.Popen[str]) -> dict[str, float]:
    """Peak memory in GiB of a process until it ends: its own pages, and all resident ones."""
    peak = {"RssAnon": 0.0, "VmHWM": 0.0}

    def poll() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                name, _, value = line.partition(":")
                if name in peak:
                    peak[name] = max(peak[name], int(value.split()[0]) / 2**20)
            time.sleep(0.02)

    thread = threading.Thread(target=poll)
    thread.start()
    process.wait()
    thread.join()
    return peak


def convert(folder: Path, adapter: Path, dtype: str, reference_net: str) -> dict[str, Any]:
    """Run the command line and measure it."""
    command = [sys.executable, "-m", "anystory_core.convert", "--dtype", dtype]
    if reference_net != "none":
        command += ["--checkpoint", str(folder / "sdxl.safetensors")]
    command += ["--reference-net", reference_net, "--ip-adapter", str(adapter)]
    command += ["--out", str(folder / "out.safetensors")]
    return measured(command, folder / "out.safetensors")


def measured(command: list[str], out: Path) -> dict[str, Any]:
    """Run a conversion that writes ``out``: its seconds, memory and result."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, text=True)
    peak = watch(process)
    if process.returncode:
        raise SystemExit("conversion failed")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak anonymous GiB": round(peak["RssAnon"], 2),
        "peak all GiB": round(peak["VmHWM"], 2),
        "file GB": round(out.stat().st_size / 1e9, 3),
    }


def one_step(folder: Path) -> dict[str, Any]:
    """Load the file and encode two subjects from random states, then two steps at 512x512 through
    the nodes with a random SDXL U-Net, each subject in its half, and two without."""
    from speed.setting import Laps, core, host, make_unet, random_picture, start_host, two_steps

    start_host()
    router, apply = host("nodes.route").SubjectRouter, host("nodes.apply").ApplyAnyStory
    encode_subject = core("subject.encoder").encode_subject
    laps = Laps()
    with torch.inference_mode():
        anystory = host("nodes.host.managed").ManagedAnyStory(
            host("nodes.bases").load_weights(folder / "out.safetensors"), "random"
        )
        laps.lap("load")
        config = anystory.model.config
        subjects = [
            encode_subject(anystory.model, *random_picture(config, number), label=label)
            for number, label in enumerate(("dog", "cat"), 1)
        ]
        laps.lap("encode")
        unet = make_unet(config)
        left, right = torch.zeros(1, 512, 512), torch.zeros(1, 512, 512)
        left[:, :, :256], right[:, :, 256:] = 1, 1
        routing = router.execute(
            anystory=anystory, mode="masks", subject_1=subjects[0], mask_1=left,
            subject_2=subjects[1], mask_2=right,
        ).args[0]  # fmt: skip
        applied, maps = apply.execute(unet, routing).args
        make = torch.Generator().manual_seed(1)
        states = torch.randn(1, 77, config.unet.context_dim, generator=make)
        words = [[states, {"pooled_output": torch.randn(1, 1280, generator=make)}]]
        noise = torch.randn(1, 4, 64, 64, generator=make)
        laps.lap("model")
        return two_steps(laps, unet, applied, maps, noise, words, cfg=7.0, scheduler="normal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16"))
    parser.add_argument("--kind", default="plus", choices=FILES)
    parser.add_argument("--reference-net", default="simplified", choices=("simplified", "none"))
    parser.add_argument("--step", action="store_true")
    given = parser.parse_args()
    config = AnyStoryConfig.sdxl()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        file, dtype = FILES[given.kind]
        inputs = write_random(folder / file, shapes_of_adapter(config, given.kind), dtype)
        if given.reference_net != "none":
            shapes = shapes_of_sdxl(config)
            inputs += write_random(folder / "sdxl.safetensors", shapes, torch.float16)
        print(json.dumps({"inputs GB": round(inputs / 1e9, 3), "cores": os.cpu_count()}))
        made = convert(folder, folder / file, given.dtype, given.reference_net)
        print(json.dumps(made), flush=True)
        if given.step:
            print(json.dumps(one_step(folder)))


if __name__ == "__main__":
    main()
