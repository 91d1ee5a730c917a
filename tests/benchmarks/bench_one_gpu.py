"""The affordable path to a router, on the mini base: COCO-style scenes -> coco -> check -> stage 2
on a file of public parts -> a file that LoadAnyStory reads, with its overlap on held-out scenes of
subjects that it has never seen, before and after.

    python3 dev.py bench one-gpu [--scenes 1500] [--held-out 64] [--steps 300] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image
from torch import Tensor

from anystory_core.training.batches import Batch
from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer
from anystory_core.training.noise import Noised
from anystory_core.weights.checkpoint import load_model, save_model
from lab.files import public, shipped
from lab.files.folder import write_base_folder
from lab.phase import half_is_faster
from lab.stages import SUBJECT_FILE
from lab.world import emoji
from lab.world.render import pool_of, render_scene

ROOT = Path(__file__).resolve().parents[2]
RUN = """
[base]
path = "base"
model = "mini"
[data]
paths = ["scenes"]
resolution = 320
workers = 0
[run]
folder = "run"
steps = {steps}
batch = 8
precision = "{precision}"
checkpointing = false
[optimiser]
learning_rate = 1e-3
warmup_steps = 20
schedule = "cosine"
[router]
subject_file = "public.safetensors"
tokens = "area"
route_weight = 1.0
mean_weight = 4.0
[validation]
every = {steps}
paths = ["held_out"]
samples = {held_out}
levels = 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        write_public_parts(work)
        emoji.download(work / "emoji")
        known, unseen = emoji.split(emoji.load_emoji(work / "emoji"))
        for name, kinds, count in (
            ("scenes", known, options.scenes),
            ("held_out", unseen, options.held_out),
        ):
            write_coco(work / f"{name}_coco", kinds, count)
            command(
                "coco", "--annotations", work / f"{name}_coco" / "instances.json", "--images",
                work / f"{name}_coco" / "images", "--out", work / name, "--name", "emoji",
            )  # fmt: skip
            command("check", work / name)
        print(f"ready after {time.monotonic() - start:.0f} s", flush=True)
        precision = "bf16" if half_is_faster() else "no"
        toml = RUN.format(steps=options.steps, held_out=options.held_out, precision=precision)
        (work / "run.toml").write_text(toml)
        trainer = Trainer(load_config(work / "run.toml"))
        before = overlap(trainer)
        print(f"overlap on held-out scenes before: {before:.1%}", flush=True)
        start = time.monotonic()
        file = trainer.run()
        print(f"{options.steps} steps of 8 in {time.monotonic() - start:.0f} s", flush=True)
        after = overlap(trainer)
        print(f"overlap on held-out scenes after: {after:.1%}")
        print(f"{file} holds {', '.join(load_model(file).parts)}")


def command(*arguments: object) -> None:
    """One of anystory_core.data's."""
    call = [sys.executable, "-m", "anystory_core.data", *map(str, arguments)]
    subprocess.run(call, cwd=ROOT, check=True)


def write_public_parts(work: Path) -> None:
    """The shipped base as a folder, and what Build AnyStory makes of its public parts."""
    shipped.restore(work / "phases")
    (work / "base").symlink_to(write_base_folder(work / "phases"))
    model = load_model(work / "phases" / SUBJECT_FILE)
    parts = public.converted(shipped.read_modules().unet, model)["simplified"]
    save_model(work / "public.safetensors", parts, parts.config)


def write_coco(folder: Path, kinds: Sequence[Any], count: int) -> None:
    """Scenes of one to three subjects as photographs with run lengths, as COCO has them."""
    (folder / "images").mkdir(parents=True)
    pool = pool_of(kinds)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for number in range(count):
        scene = render_scene(pool, 900_000_000 + number, subjects=1 + number % 3)
        height, width = scene.picture.shape[:2]
        name = f"{number:06d}.png"
        Image.fromarray(scene.picture).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        captions.append({"image_id": number, "caption": scene.caption})
        for instance in scene.instances:
            flat = instance.mask.ravel("F").astype(np.int8)
            ends = np.flatnonzero(np.diff(flat, prepend=0, append=flat[-1] ^ 1))
            counts = np.diff(ends, prepend=0).tolist()
            segmentation = {"size": [height, width], "counts": counts}
            row = {"image_id": number, "category_id": 1, "segmentation": segmentation}
            annotations.append(row)
    table = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "it"}]}
    (folder / "instances.json").write_text(json.dumps(table))


def overlap(trainer: Trainer) -> float:
    """Mean overlap with the true masks of those that the mean map over all blocks gives: the
    trainer's own validation, at timestep 500 with fixed noise."""
    assert trainer.validation is not None

    def measure(batch: Batch, noised: Noised) -> dict[str, Tensor]:
        return trainer.stage(batch, noised, measure=True)

    return trainer.validation.run(measure, trainer.ranks)["routing_iou"]


if __name__ == "__main__":
    main()
