"""What a run says while it trains: a progress bar, its trackers, and ``losses.jsonl``."""

from __future__ import annotations

import json
import resource
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from . import checkpoints
from .config import TrainingConfig
from .libraries import library
from .provenance import shared_settings
from .ranks import Ranks

_KIB = 2**10 if sys.platform != "darwin" else 1  # unit of ru_maxrss in bytes


def say(text: str) -> None:
    """A line above the progress bar."""
    library("tqdm").tqdm.write(text, file=sys.stderr)


def peak_memory(device: torch.device) -> float:
    """The most that this process has held at once, in GiB: on an accelerator, its tensors there;
    else its part of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB / 2**30


class Means:
    """Means over the micro-batches since they were last taken. Sums stay on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            own = value.detach().double() if value.device.type != "mps" else value.detach()
            self._sums[name] = self._sums[name] + own if name in self._sums else own
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, ranks: Ranks) -> dict[str, float]:
        """The means over all processes, which call this together; begins anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return ranks.mean(means)


class Curves:
    """The run's figures, through accelerate's trackers and in a file of our own."""

    def __init__(self, accelerator: Any, ranks: Ranks, config: TrainingConfig, batch: int) -> None:
        """``batch``: samples of one step, over all processes."""
        self.accelerator, self.ranks, self.config, self._batch = accelerator, ranks, config, batch
        self.folder = Path(config.run.folder)
        self.means = Means()
        self._since, self._step = time.monotonic(), 0
        self._bar: Any = None

    def begin(self, total: int, done: int) -> None:
        """Open the trackers and the bar; ``done`` of ``total`` steps lie behind."""
        with self._writing():
            self.accelerator.init_trackers("training", init_kwargs={"wandb": self._of_wandb()})
            for tracker in self.accelerator.trackers:
                if tracker.name == "wandb":  # TensorBoard would make a second run of them
                    tracker.store_init_configuration(shared_settings(self.config))
        self._bar = library("tqdm").tqdm(
            mininterval=1.0,
            total=total,
            initial=done,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        self._since, self._step = time.monotonic(), done

    def _of_wandb(self) -> dict[str, Any]:
        """What wandb calls the run: a start that goes on from a checkpoint is the same run."""
        if "wandb" not in self.config.run.trackers or not self.ranks.main:
            return {}
        file = self.folder / "wandb.id"
        if not file.exists():
            file.write_text(uuid.uuid4().hex)
        folder, name = str(self.folder), self.folder.name
        return {"id": file.read_text(), "resume": "allow", "name": name, "dir": folder}

    def advance(self) -> None:
        """One more step on the bar."""
        self._bar.update()

    def log(self, step: int, learning_rate: float) -> None:
        """The means since the last call, over steps and processes, with what a step took."""
        seconds = (time.monotonic() - self._since) / max(1, step - self._step)
        values = self.means.take(self.ranks)
        memory = max(self.ranks.gather(peak_memory(self.ranks.device)))
        rate = self._batch / seconds
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.2f} samples/s")
        values |= {
            "learning_rate": learning_rate,
            "seconds": seconds,
            "samples_per_second": rate,
            "peak_memory_gib": memory,
        }
        self.add(step, "loss", values)
        self._since, self._step = time.monotonic(), step

    def add(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Values of a step, named GROUP/NAME in the trackers; after a resume a step may be in
        ``losses.jsonl`` twice."""
        with self._writing():
            self.accelerator.log({f"{group}/{k}": v for k, v in values.items()}, step=step)
            if self.ranks.main:
                prefix = "" if group == "loss" else f"{group}/"
                named = {prefix + name: value for name, value in values.items()}
                with open(self.folder / "losses.jsonl", "a") as file:
                    file.write(json.dumps({"step": step, **named}) + "\n")

    def add_pictures(self, step: int, name: str, pictures: Tensor) -> None:
        """Pictures (B,H,W,3) uint8, to the trackers that show some."""
        if self.ranks.main:
            with self._writing():
                for tracker in self.accelerator.trackers:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({name: cast(Any, pictures).numpy()}, step=step, **layout)

    def end(self) -> None:
        self._bar.close()
        with self._writing():
            self.accelerator.end_training()

    def _writing(self) -> AbstractContextManager[None]:
        return checkpoints.writing("run.folder", "the curve of the losses", self.folder)
