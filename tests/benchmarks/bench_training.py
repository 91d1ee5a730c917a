"""Training steps: samples per second and peak memory.

``bench_training.py`` measures both stages at the mini sizes, and stage 1 beside the loop that one
would write with diffusers (:mod:`plain_loop`): the same random base, batch, precision and
optimiser, each in a process of its own, in turn. ``--sdxl`` runs one forward and backward pass of
stage 2 at SDXL's widths instead, in bfloat16 on random weights (512 x 512, one subject, activation
checkpointing); it needs about 15 GiB and some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from plain_loop import PlainLoop
from torch import nn

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.mini.config import PICTURE_SIZE
from anystory_core.training.batches import Batch
from anystory_core.training.cache import Encoded, Encodings
from anystory_core.training.config import TrainingConfig
from anystory_core.training.hosts.frozen import FrozenNetworks
from anystory_core.training.hosts.sizes import diffusers_unet_config
from anystory_core.training.hosts.unet import time_ids
from anystory_core.training.noise import draw_noise, draw_timesteps, make_noised
from anystory_core.training.schedule import Schedule
from anystory_core.training.settings import (
    BaseSettings,
    DataSettings,
    RouterSettings,
    RunSettings,
    SubjectSettings,
)
from anystory_core.training.stages import build_stage
from anystory_core.weights.model import build_model


class RandomVision(nn.Module):
    """Stands for the frozen CLIP vision encoder: states of its shape, at no cost."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.randn(1, tokens, width) * 0.02, requires_grad=False)

    def forward(self, pixels: torch.Tensor, **_: Any) -> Any:
        states = self.states.expand(pixels.shape[0], -1, -1)
        return type("Out", (), {"hidden_states": (states, states)})


def random_base(config: AnyStoryConfig, dtype: torch.dtype) -> FrozenNetworks:
    """A base of the config's sizes with random weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        unet: Any = UNet2DConditionModel(**diffusers_unet_config(config.unet))
    finally:
        torch.set_default_dtype(before)
    vae: Any = AutoencoderTiny()
    vision: Any = RandomVision(config.clip.tokens, config.clip.width).to(dtype)
    modules = (unet, vae, vision)
    for module in modules:
        module.eval().requires_grad_(False)
    return FrozenNetworks(config, unet, vae, lambda captions: None, vision, modules, "random")


def batch_of(config: AnyStoryConfig, rows: int, side: int) -> Batch:
    """Random samples with one subject each; its mask is the left half."""
    generator = torch.Generator().manual_seed(0)
    clip, reference = config.clip.image_size, config.reference.size
    mask = torch.zeros(rows, 1, side, side)
    mask[..., : side // 2] = 1
    return Batch(
        numbers=tuple(range(rows)),
        keys=("",) * rows,
        captions=("",) * rows,
        target=torch.rand(rows, 3, side, side, generator=generator) * 2 - 1,
        time_ids=time_ids(side, side, rows, torch.device("cpu")),
        masks=mask,
        clip=torch.randn(rows, 1, 3, clip, clip, generator=generator),
        vae=torch.rand(rows, 1, 3, reference, reference, generator=generator) * 2 - 1,
        reference_mask=torch.ones(rows, 1, 1, reference, reference),
        present=torch.ones(rows, 1, dtype=torch.bool),
        drop_clip=torch.zeros(rows, dtype=torch.bool),
        bad=(),
    )


CPU = torch.device("cpu")


def moved(batch: Batch, device: torch.device) -> Batch:
    """With its tensors on a device."""
    entries = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    there = {name: x.to(device) for name, x in entries.items() if isinstance(x, torch.Tensor)}
    return dataclasses.replace(batch, **there)


def measure(
    config: AnyStoryConfig,
    stage: str,
    *,
    rows: int,
    side: int,
    steps: int,
    checkpointing: bool,
    device: torch.device = CPU,
) -> dict[str, float]:
    """Optimiser steps of one stage: seconds, samples per second, operations apart."""
    sdxl = config.name == "sdxl"
    dtype = torch.bfloat16 if sdxl else torch.float32
    base = random_base(config, dtype)
    base.to(device, dtype)
    run = RunSettings(folder="unused", steps=1, checkpointing=checkpointing)
    settings: dict[str, Any] = {
        "base": BaseSettings(path="random"), "data": DataSettings(paths=("random",)), "run": run,
    }  # fmt: skip
    if stage == "subject":
        settings["subject"] = SubjectSettings()
    else:
        settings["router"] = RouterSettings(subject_file="random")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = build_model(config, device=device)
    finally:
        torch.set_default_dtype(before)
    config_of_run = TrainingConfig(**settings)
    trained = build_stage(model, Encodings(base, config_of_run), config_of_run)
    optimiser = torch.optim.AdamW([p for _, p in trained.trained()], lr=1e-4)
    batch = moved(batch_of(config, rows, side), device)
    width = config.unet.adm_channels - 6 * 256
    text = torch.zeros(rows, 77, config.unet.context_dim, device=device)
    pooled = torch.zeros(rows, width, device=device)
    with torch.no_grad():
        clean = base.encode_picture(batch.target)
    encoded = Encoded(clean, text, pooled, batch.time_ids)
    schedule = Schedule(base.prediction)
    seconds: list[float] = []
    for step in range(steps):
        noise = draw_noise(clean.shape[1:], range(rows), step)
        t = draw_timesteps(range(rows), step, len(schedule))
        noised = make_noised(schedule, encoded, noise.to(device), t.to(device), tuple(range(rows)))
        start = time.monotonic()
        with torch.autocast(device.type, torch.bfloat16):
            loss = trained(batch, noised)["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - start)
    return _figures(seconds, rows, sum(p.numel() for _, p in trained.trained()))


CONTENDERS = ("ours", "plain")
OURS, PLAIN = (f"stage 1 beside diffusers: {name}" for name in CONTENDERS)
ROUNDS = 3


def measure_plain(config: AnyStoryConfig, *, rows: int, side: int, steps: int) -> dict[str, float]:
    """Optimiser steps of the plain loop, as :func:`measure` does stage 1's."""
    base = random_base(config, torch.float32)
    torch.manual_seed(0)
    loop = PlainLoop(base.unet, base.vae, base.clip_vision, config)
    trained = [p for p in loop.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    batch = batch_of(config, rows, side)
    width = config.unet.adm_channels - 6 * 256
    text = torch.zeros(rows, 77, config.unet.context_dim)
    added = {"text_embeds": torch.zeros(rows, width), "time_ids": batch.time_ids}
    with torch.no_grad():
        clean = base.encode_picture(batch.target)
    schedule = Schedule(base.prediction)
    seconds: list[float] = []
    for step in range(steps):
        noise = draw_noise(clean.shape[1:], range(rows), step)
        t = draw_timesteps(range(rows), step, len(schedule))
        noisy = schedule.noisy(clean, noise, t)
        start = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16):
            latents = base.encode_picture(batch.vae[:, 0])
            loss = loop(noisy, t, text, added, batch.clip[:, 0], latents, noise)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seconds.append(time.monotonic() - start)
    return _figures(seconds, rows, sum(p.numel() for p in trained))


def _figures(seconds: list[float], rows: int, trained: int) -> dict[str, float]:
    middle = sorted(seconds[1:] or seconds)[len(seconds[1:]) // 2]
    return {
        "seconds per step": round(middle, 3),
        "samples per second": round(rows / middle, 3),
        "trained parameters (M)": round(trained / 1e6, 2),
        "peak memory (GiB)": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def beside(batch: int, steps: int) -> dict[str, dict[str, float]]:
    """Both contenders in turn, each time in a new process; of each the median round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name in CONTENDERS:
            command = [
                sys.executable, __file__, "--contender", name, "--batch", str(batch),
                "--steps", str(steps),
            ]  # fmt: skip
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows: dict[str, dict[str, float]] = {}
    for name, label in zip(CONTENDERS, (OURS, PLAIN), strict=True):
        ordered = sorted(found[name], key=lambda row: row["samples per second"])
        rows[label] = ordered[len(ordered) // 2]
    rows["ours / plain"] = {
        key: round(rows[OURS][key] / rows[PLAIN][key], 3)
        for key in ("samples per second", "peak memory (GiB)")
    }
    return rows


def contender(name: str, batch: int, steps: int) -> dict[str, float]:
    config, side = AnyStoryConfig.mini(), PICTURE_SIZE
    if name == "plain":
        return measure_plain(config, rows=batch, side=side, steps=steps)
    return measure(config, "subject", rows=batch, side=side, steps=steps, checkpointing=False)


def main() -> None:
    """Print a line for each measurement, then all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sdxl", action="store_true", help="stage 2 at SDXL's widths instead")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="mini only; SDXL takes 1")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.contender:
        print(json.dumps(contender(given.contender, given.batch, given.steps)))
        return
    rows: dict[str, dict[str, float]] = {}
    if given.sdxl:
        rows["sdxl router, 512x512, batch 1"] = measure(
            AnyStoryConfig.sdxl(), "router", rows=1, side=512, steps=1, checkpointing=True
        )
    else:
        side = PICTURE_SIZE
        for stage in ("subject", "router"):
            rows[f"mini {stage}, {side}x{side}, batch {given.batch}"] = measure(
                AnyStoryConfig.mini(), stage, rows=given.batch, side=side, steps=given.steps,
                checkpointing=False,
            )  # fmt: skip
        rows |= beside(given.batch, given.steps)
    for name, row in rows.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
