"""What a run says while it trains: a progress bar, TensorBoard, and ``losses.jsonl``."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from . import checkpoints
from .libraries import library


def say(text: str) -> None:
    """A line above the progress bar."""
    library("tqdm").tqdm.write(text, file=sys.stderr)


class Curves:
    """The run's figures, through accelerate's trackers and in a file of our own."""

    def __init__(self, accelerator: Any, folder: Path) -> None:
        self.accelerator, self.folder = accelerator, folder

    def begin(self) -> None:
        with self._writing():
            self.accelerator.init_trackers("training")

    def add(self, step: int, values: dict[str, float]) -> None:
        """The values of a step; after a resume a step may be there twice."""
        with self._writing():
            self.accelerator.log({f"loss/{k}": v for k, v in values.items()}, step=step)
            if self.accelerator.is_main_process:
                with open(self.folder / "losses.jsonl", "a") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")

    def end(self) -> None:
        with self._writing():
            self.accelerator.end_training()

    def bar(self, total: int, done: int) -> Any:
        """A progress bar of the first process of each machine."""
        return library("tqdm").tqdm(
            mininterval=1.0,
            total=total,
            initial=done,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )

    def _writing(self) -> AbstractContextManager[None]:
        return checkpoints.writing("run.folder", "the curve of the losses", self.folder)
