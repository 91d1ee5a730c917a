"""Make the mini model, phase by phase: ``python -m lab.recipe --work DIR``.

Phases, in order: ``world`` (render scenes), ``vae``, ``decoder``, ``clip``, ``cache`` (encode the
scenes), ``base`` (the U-Net), ``folder`` (all that as the trainer reads it), ``start`` (where stage
1 begins: what the base has learned of it), ``stage1`` and ``stage2``
(:mod:`anystory_core.training`), ``identity``, ``finder`` and ``outline`` (the networks that
:mod:`.evaluate` measures with), ``export`` (files that ship). Only when asked for by name:
``no_clip``, ``no_reference`` and ``no_refinement``, the stages of its ablations; ``restore``, which
begins a folder from the shipped weights, so that ``decoder``, ``base`` (after ``world`` and
``cache``), then ``folder``, ``start`` and the stages go on from them; and ``carry``, which writes
the base as it is to ``DIR/base.safetensors``, for ``restore --base-file`` on another machine.

Each resumes where it stopped when the same command is given again and has its own seed. Those that
train write their curve to ``DIR/NAME.csv``, the stages to ``DIR/NAME/losses.jsonl``. More
shards may be rendered and cached at any time, also while the base trains. ``cache`` and ``base``
run on a CUDA device where there is one.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anystory_core.mini.config import PICTURE_SIZE
from anystory_core.training.loop import Trainer
from anystory_core.training.watch import together

from .files.carried import write_base
from .files.export import export
from .files.folder import write_base_folder
from .files.shipped import restore
from .files.start import START_FILE, write_start
from .measuring.finder import train_finder
from .measuring.identity import train_identity
from .measuring.outline import train_outline
from .networks.base import BATCH, train_base
from .networks.cache import missing
from .networks.cache import write_shard as cache_shard
from .networks.clip import load_clip, train_clip
from .networks.vae import DECODER_STEPS, load_vae, train_decoder, train_vae
from .phase import accelerator, run_shared, shares
from .stages import LEARNING_RATE, SUBJECT_FILE, stage1, stage2, write_data
from .world import emoji
from .world.scenes import folder_of, write_shard

PHASES = (
    "world",
    "vae",
    "decoder",
    "clip",
    "cache",
    "base",
    "folder",
    "start",
    "stage1",
    "stage2",
    "identity",
    "finder",
    "outline",
    "export",
)
# Stage, and what its configuration leaves out.
ABLATIONS: dict[str, tuple[int, dict[str, bool]]] = {
    "no_clip": (1, {"clip": False}),
    "no_reference": (1, {"reference": False}),
    "no_refinement": (2, {"refine": False}),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    work: Path
    shards: int
    picture_size: int
    decoder_steps: int
    base_steps: int
    base_batch: int
    sample_shards: int
    stage1_steps: int
    stage2_steps: int
    processes: int
    base_file: Path | None
    start_file: str
    learning_rate: float

    def start(self, name: str, stage: int) -> dict[str, Any]:
        """Where a stage begins: stage 1 with what the base has learned of it, unless a file is
        given."""
        file = self.start_file or (str(self.work / START_FILE) if stage == 1 else "")
        return {"name": name, "start_file": file, "learning_rate": self.learning_rate}

    def training_emoji(self) -> list[emoji.Emoji]:
        """All subjects but the held-out families; fetched first when missing."""
        sources = self.work / "sources"
        emoji.download(sources)
        return emoji.split(emoji.load_emoji(sources))[0]


def run_phase(name: str, options: Options) -> None:
    """Run or resume one phase."""
    work = options.work
    if name == "world":
        size = options.picture_size
        task = partial(render_scenes, options.training_emoji(), work, options.shards, size)
        run_shared(task, options.processes)
    elif name == "vae":
        run_shared(partial(train_vae, options.training_emoji(), work), options.processes)
    elif name == "clip":
        run_shared(partial(train_clip, options.training_emoji(), work), options.processes)
    elif name == "decoder":
        task = partial(train_decoder, options.training_emoji(), work, options.decoder_steps)
        run_shared(task, options.processes)
    elif name == "cache":
        run_shared(partial(cache_scenes, work, options.picture_size), options.processes)
    elif name == "base":
        steps, batch, size = options.base_steps, options.base_batch, options.picture_size
        task = partial(train_base, work, steps=steps, batch=batch, size=size)
        run_shared(task, 1 if accelerator().type == "cuda" else options.processes)
    elif name == "folder":
        write_base_folder(work)
    elif name == "identity":
        run_shared(partial(train_identity, options.training_emoji(), work), options.processes)
    elif name == "finder":
        run_shared(partial(train_finder, options.training_emoji(), work), options.processes)
    elif name == "outline":
        run_shared(partial(train_outline, options.training_emoji(), work), options.processes)
    elif name == "restore":
        restore(work, base_file=options.base_file)
    elif name == "carry":
        write_base(work)
    elif name == "start":
        write_start(work)
    elif name in ABLATIONS:
        stage, without = ABLATIONS[name]
        steps = options.stage1_steps if stage == 1 else options.stage2_steps
        task = partial(train_stage, work, stage, steps, **options.start(name, stage), **without)
        run_shared(task, options.processes)
    elif name == "stage1":
        write_data(options.training_emoji(), work, "pairs", options.sample_shards)
        task = partial(train_stage, work, 1, options.stage1_steps, **options.start(name, 1))
        run_shared(task, options.processes)
    elif name == "stage2":
        write_data(options.training_emoji(), work, "scenes", options.sample_shards)
        task = partial(train_stage, work, 2, options.stage2_steps, **options.start(name, 2))
        run_shared(task, options.processes)
    else:
        for part, size in export(work).items():
            print(f"export: {part} {size / 2**20:.2f} MiB", flush=True)


def train_stage(work: Path, stage: int, steps: int, **settings: Any) -> None:
    """Train or resume a stage with the project's trainer; all processes that share it call this.
    ``settings`` are those of :func:`.stages.stage1` or :func:`.stages.stage2`."""
    part, parts = shares()
    if parts > 1:  # what accelerate looks for
        rank = {"RANK": part, "LOCAL_RANK": part, "WORLD_SIZE": parts, "LOCAL_WORLD_SIZE": parts}
        os.environ.update({name: str(value) for name, value in rank.items()})
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if stage == 1:
        config = stage1(work, steps, **settings)
    else:
        config = stage2(work, steps, work / SUBJECT_FILE, **settings)
    with together():
        Trainer(config).run()


def render_scenes(subjects: list[emoji.Emoji], work: Path, shards: int, size: int) -> None:
    """Render what is missing of so many shards of a size, this process's share of them."""
    part, parts = shares()
    for number in range(part, shards, parts):
        write_shard(subjects, folder_of(work, "scenes", size), number, size)


def cache_scenes(work: Path, size: int) -> None:
    """Encode the rendered shards of a size that are not encoded yet, this process's share of
    them."""
    scenes, cache = folder_of(work, "scenes", size), folder_of(work, "cache", size)
    vae, (clip, row_table) = load_vae(work), load_clip(work)
    vae.to(accelerator())
    clip.to(accelerator())
    part, parts = shares()
    for number in missing(scenes, cache):
        if number % parts != part:
            continue
        cache_shard(scenes, cache, number, vae, clip, row_table)
        print(f"cache: shard {number}", flush=True)


def main() -> None:
    """Run one phase, or all of them in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for sources and states")
    choices = (*PHASES, *ABLATIONS, "restore", "carry")
    parser.add_argument("--phase", nargs="+", choices=choices, help="only these, in this order")
    parser.add_argument("--shards", type=int, default=24, help="shards of 500 scenes to render")
    parser.add_argument(
        "--picture-size",
        type=int,
        default=PICTURE_SIZE,
        help="of world, cache and base; default %(default)s",
    )
    parser.add_argument(
        "--decoder-steps", type=int, default=DECODER_STEPS, help="length of the decoder phase"
    )
    parser.add_argument("--base-steps", type=int, default=60_000, help="length of the base phase")
    parser.add_argument("--base-batch", type=int, default=BATCH, help="scenes of a step of it")
    parser.add_argument("--processes", type=int, default=2, help="training processes of one thread")
    parser.add_argument("--sample-shards", type=int, default=20, help="500 samples of each stage")
    parser.add_argument("--stage1-steps", type=int, default=20_000)
    parser.add_argument("--stage2-steps", type=int, default=8_000)
    parser.add_argument("--base-file", type=Path, help="what carry wrote, for restore")
    parser.add_argument("--start-file", default="", help="AnyStory weights a stage goes on from")
    parser.add_argument(
        "--learning-rate", type=float, default=LEARNING_RATE, help="of a stage; default %(default)s"
    )
    given = vars(parser.parse_args())
    phases = given.pop("phase") or PHASES
    options = Options(**given)
    torch.set_flush_denormal(True)
    for name in phases:
        run_phase(name, options)


if __name__ == "__main__":
    main()
