"""Run with FOLDER: what each writer says when no file may be larger than 64 KiB, as JSON."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file

from anystory_core.errors import AnyStoryError
from anystory_core.subject.files import save_subject
from anystory_core.subject.subject import Subject
from anystory_core.training import checkpoints
from anystory_core.weights.checkpoint import save_model
from anystory_core.weights.model import build_model

folder = Path(sys.argv[1])
large = {"x": torch.zeros(100_000)}
subject = Subject(
    label="fox", tokens=large["x"][None], features=(), routing=None, background_tokens=None,
    background_routing=None, cutout=torch.zeros(1, 8, 8, 3, dtype=torch.uint8), fingerprint="",
    clip_fingerprint="",
)  # fmt: skip


def losses() -> None:
    with checkpoints.writing("run.folder", "the curve of the losses", folder):
        (folder / "losses.jsonl").write_text("0" * 100_000)


def checkpoint() -> None:
    checkpoints.write(folder / "checkpoints", 1, 3, lambda p: save_file(large, p / "x.safetensors"))


config = tiny.config()
model = build_model(config, ["reference_net"])
writers: dict[str, Callable[[], object]] = {
    "checkpoint": checkpoint,
    "weights": lambda: save_model(folder / "out.safetensors", model, config),
    "subject": lambda: save_subject(folder / "fox.safetensors", subject, overwrite=True),
    "losses": losses,
}
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
said: dict[str, str] = {}
for name, write in writers.items():
    try:
        write()
    except AnyStoryError as error:
        said[name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
