"""Stages 1 and 2 of the mini model: this project's trainer, configured. No loop of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anystory_core.mini.config import PICTURE_SIZE
from anystory_core.training.config import TrainingConfig
from anystory_core.training.settings import (
    AugmentSettings,
    BaseSettings,
    DataSettings,
    OptimiserSettings,
    RouterSettings,
    RunSettings,
    SubjectSettings,
)

from .networks.base import DROP_CLIP
from .phase import half_is_faster, shares
from .world.emoji import Emoji
from .world.samples import Kind, write_samples

SUBJECT_FILE = Path("stage1") / "anystory_subject.safetensors"
WHOLE_FILE = Path("stage2") / "anystory.safetensors"

# The references of a pair stand as the target's subject does, in another light
# (:mod:`.world.samples`). Without more of it their encodings are kept on disk: the VAE was 60 % of
# a step's time.
_AUGMENT = AugmentSettings(rotate=0.0, crop=0.0, pad=0.0, flip=0.0)
BATCH = 16
# To begin with, and less to the end (cosine): a fifth of it lowered Eq. 1 on held-out pairs again.
LEARNING_RATE = 1e-3
_EMA = 0.995  # the rate's decay averages too
# With Eq. 1 as it is, stage 1 lowered the error of the whole picture and raised it in the subject.
_INSIDE = 3.0


def write_data(emoji: list[Emoji], work: Path, kind: Kind, shards: int) -> Path:
    """Render the samples of a stage that are missing; returns their folder."""
    folder = work / kind
    for number in range(shards):
        write_samples(emoji, folder, kind, number)
    return folder


def _shared(work: Path, kind: Kind, steps: int, seed: int, name: str) -> dict[str, Any]:
    return {
        "base": BaseSettings(path=str(work / "base"), model="mini"),
        "data": DataSettings(
            paths=(str(work / kind),),
            resolution=PICTURE_SIZE,
            workers=0,
            cache=str(work / "encodings"),
        ),
        "run": RunSettings(
            folder=str(work / name),
            steps=steps,
            batch=BATCH // shares()[1],
            seed=seed,
            checkpointing=False,
            precision="bf16" if half_is_faster() else "no",
            timesteps="cubic" if kind == "pairs" else "uniform",
            checkpoint_every="5 min",
            sheet_every=1000,
        ),
        "augment": _AUGMENT,
    }


def _optimiser(learning_rate: float, warmup_steps: int) -> OptimiserSettings:
    return OptimiserSettings(
        learning_rate=learning_rate, warmup_steps=warmup_steps, schedule="cosine", ema=_EMA
    )


def stage1(
    work: Path,
    steps: int,
    *,
    clip: bool = True,
    reference: bool = True,
    name: str = "stage1",
    start_file: str = "",
    learning_rate: float = LEARNING_RATE,
) -> TrainingConfig:
    """The subject encoder on pairs; without a branch for the ablations."""
    return TrainingConfig(
        **_shared(work, "pairs", steps, 11, name),
        subject=SubjectSettings(
            clip=clip,
            reference=reference,
            inside=_INSIDE,
            drop_clip=DROP_CLIP,
            start_file=start_file,
        ),
        optimiser=_optimiser(learning_rate, warmup_steps=100),
    )


def stage2(
    work: Path,
    steps: int,
    subject_file: Path,
    *,
    refine: bool = True,
    name: str = "stage2",
    start_file: str = "",
    learning_rate: float = LEARNING_RATE,
) -> TrainingConfig:
    """The router on scenes; without refinement for the ablation."""
    return TrainingConfig(
        **_shared(work, "scenes", steps, 12, name),
        router=RouterSettings(
            subject_file=str(subject_file),
            route_weight=1.0,
            tokens="area",  # with Eq. 4's sum the smallest quarter of subjects had 0.3 IoU
            mean_weight=4.0,
            refine=refine,
            start_file=start_file,
        ),
        optimiser=_optimiser(learning_rate, warmup_steps=20),
    )
