"""A resumable training phase of the mini recipe: checkpoints, a curve on disk, seeds.

Only the parts below this project's own two stages (VAE, CLIP, base U-Net, evaluation networks) are
trained here; stages 1 and 2 are :mod:`anystory_core.training`.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CHECKPOINT_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase: ``steps`` optimiser steps, cosine learning rate with a short warm-up."""

    name: str
    folder: Path
    steps: int
    learning_rate: float
    seed: int
    weight_decay: float = 0.01
    ema: float = 0.0
    log_every: int = 20

    @property
    def state_file(self) -> Path:
        """Where the phase's checkpoint lies."""
        return self.folder / f"{self.name}.state.pt"

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        warm = min(1.0, (step + 1) / max(1, min(100, self.steps // 20)))
        return self.learning_rate * warm * (0.02 + 0.98 * _cosine(step / self.steps))

    def run(
        self, modules: nn.Module, loss_of: Callable[[int, torch.Generator], Tensor]
    ) -> dict[str, Tensor]:
        """Train ``modules`` on ``loss_of(step, generator)`` from the last checkpoint on; returns
        the final weights (their moving average when ``ema`` is set), loaded into ``modules`` too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        optimiser = torch.optim.AdamW(
            modules.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        average = {k: v.detach().clone() for k, v in modules.state_dict().items()}
        step, spent = 0, 0.0
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True)
            modules.load_state_dict(state["weights"])
            optimiser.load_state_dict(state["optimiser"])
            average, step, spent = state["average"], state["step"], state["seconds"]
        start = last = time.monotonic()

        def save() -> None:
            state: dict[str, Any] = {
                "weights": modules.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average,
                "step": step,
                "seconds": spent + time.monotonic() - start,
            }
            temporary = self.state_file.with_suffix(".tmp")
            torch.save(state, temporary)
            os.replace(temporary, self.state_file)

        modules.train()
        total = 0.0
        while step < self.steps:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            for group in optimiser.param_groups:
                group["lr"] = self.rate(step)
            loss = loss_of(step, generator)
            loss.backward()
            nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            step += 1
            total += float(loss.detach())
            if self.ema:
                decay = min(self.ema, (1 + step) / (10 + step))
                for name, value in modules.state_dict().items():
                    average[name].lerp_(value.to(average[name].dtype), 1 - decay)
            if step % self.log_every == 0 or step == self.steps:
                seconds = spent + time.monotonic() - start
                self._log(step, total / self.log_every, seconds)
                total = 0.0
            if time.monotonic() - last > CHECKPOINT_SECONDS:
                save()
                last = time.monotonic()
        save()
        if self.ema:
            modules.load_state_dict(average)
        modules.eval()
        return modules.state_dict()

    def _log(self, step: int, loss: float, seconds: float) -> None:
        path = self.folder / f"{self.name}.csv"
        fresh = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(("step", "loss", "seconds"))
            writer.writerow((step, f"{loss:.5f}", f"{seconds:.0f}"))
        print(f"{self.name} {step}/{self.steps} loss {loss:.5f} {seconds:.0f} s", flush=True)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
