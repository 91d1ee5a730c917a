"""A resumable training phase of the mini recipe: checkpoints, a curve on disk, seeds.

Only the parts below this project's own two stages (VAE, CLIP, base U-Net, evaluation networks) are
trained here; stages 1 and 2 are :mod:`anystory_core.training`.

On a small CPU several processes of one thread each, which share a batch and average their gradients
once per step, keep going when the machine is busy with other things; threads that wait for each
other in every layer do not. :func:`run_shared` starts them.
"""

from __future__ import annotations

import csv
import functools
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from .muon import Muon, is_matrix

CHECKPOINT_SECONDS = 300
CPU = torch.device("cpu")
_MUON = 2.0  # its rate is that many times AdamW's


@functools.cache
def half_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones; measured.

    One with AVX-512 and units for bfloat16 was five times as fast, another one with the same flags
    0.6 times, so flags do not tell."""
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(5):  # the least, in turn: the machine may be busy
        for dtype, least in seconds.items():
            square = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            _ = square @ square
            seconds[dtype] = min(least, time.perf_counter() - start)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def accelerator() -> torch.device:
    """Where what is large runs: the first CUDA device where there is one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_in_half(device: torch.device) -> bool:
    """Whether what runs there is to be in bfloat16."""
    return device.type != "cpu" or half_is_faster()


def autocast(device: torch.device = CPU) -> torch.autocast:
    """Autocast to bfloat16 where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_in_half(device))


def shares() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def run_shared(task: Callable[[], None], processes: int) -> None:
    """Run ``task`` in this process, or in ``processes`` of one thread each. ``task`` is pickled."""
    if processes == 1:
        task()
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(_share, (task, processes, f"file://{folder}/meet"), nprocs=processes)


def _share(number: int, task: Callable[[], None], processes: int, meet: str) -> None:
    # With SIGINT torch tells a process that its parent was killed. What a script starts in the
    # background ignores it, and would train on beside the run that resumes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meet, rank=number, world_size=processes)
    try:
        task()
    finally:
        if distributed.is_initialized():  # the trainer ends it itself
            distributed.destroy_process_group()


def first_makes(file: Path, make: Callable[[], object]) -> None:
    """Let the first of the processes that share a phase make a file that all of them read, unless
    it is there. All must call this."""
    if not shares()[0] and not file.exists():
        make()
    if distributed.is_initialized():
        distributed.barrier()


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    start = 0
    for g in gradients:
        g.copy_(flat[start : start + g.numel()].view_as(g))
        start += g.numel()


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase: ``steps`` optimiser steps, cosine learning rate with a short warm-up.

    ``optimiser``: "muon" updates matrices and convolutions by :class:`~.muon.Muon`, at twice
    ``learning_rate``, and leaves the rest to AdamW. ``level``: the rate stays what it is for this
    part of the phase and then falls, so that a long phase can be cut short at no loss before
    it."""

    name: str
    folder: Path
    steps: int
    learning_rate: float
    seed: int
    weight_decay: float = 0.01
    optimiser: Literal["adamw", "muon"] = "adamw"
    level: float = 0.0
    ema: float = 0.0
    log_every: int = 20

    @property
    def state_file(self) -> Path:
        """Where the phase's checkpoint lies."""
        return self.folder / f"{self.name}.state.pt"

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        warm = min(1.0, (step + 1) / max(1, min(100, self.steps // 20)))
        falling = max(0.0, step / self.steps - self.level) / (1 - self.level)
        return self.learning_rate * warm * (0.02 + 0.98 * _cosine(falling))

    def optimisers(self, parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Those that update ``parameters`` together."""
        rate, decay = self.learning_rate, self.weight_decay
        muon = self.optimiser == "muon"
        matrices = [p for p in parameters if muon and is_matrix(p)]
        others = [p for p in parameters if not (muon and is_matrix(p))]
        made: list[torch.optim.Optimizer] = []
        if matrices:
            half = fast_in_half(matrices[0].device)
            computed_in = torch.bfloat16 if half else torch.float32
            made.append(Muon(matrices, rate, decay, computed_in))
        if others:
            adamw = torch.optim.AdamW(others, lr=rate, weight_decay=decay, fused=True)
            made.append(adamw)
        return made

    def final(self) -> dict[str, Tensor]:
        """The checkpoint's final weights: their average when ``ema`` is set. FileNotFoundError when
        the phase never ran."""
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        return state["average" if self.ema else "weights"]

    def load(self, modules: nn.Module) -> None:
        """Put :meth:`final` into ``modules``."""
        modules.load_state_dict(self.final())
        modules.eval()

    def run(
        self, modules: nn.Module, loss_of: Callable[[int, torch.Generator], Tensor]
    ) -> dict[str, Tensor]:
        """Train ``modules`` on ``loss_of(step, generator)`` from the last checkpoint on; returns
        the final weights (their moving average when ``ema`` is set), loaded into ``modules`` too.
        With several processes each calls this, and gives the loss of its own share."""
        part, parts = shares()
        self.folder.mkdir(parents=True, exist_ok=True)
        parameters = list(modules.parameters())
        optimisers = self.optimisers(parameters)
        average = {k: v.detach().clone() for k, v in modules.state_dict().items()}
        step, spent = 0, 0.0
        if self.state_file.exists():
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
            modules.load_state_dict(state["weights"])
            # Not there when restored from shipped weights.
            for optimiser, kept in zip(optimisers, state.get("optimisers", ()), strict=False):
                optimiser.load_state_dict(kept)
            average = {k: v.to(average[k].device) for k, v in state["average"].items()}
            step, spent = state["step"], state["seconds"]
        start = last = time.monotonic()

        def save() -> None:
            state: dict[str, Any] = {
                "weights": modules.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                "average": average,
                "step": step,
                "seconds": spent + time.monotonic() - start,
            }
            temporary = self.state_file.with_suffix(".tmp")
            torch.save(state, temporary)
            os.replace(temporary, self.state_file)

        modules.train()
        total, counted = 0.0, 0
        while step < self.steps:
            generator = torch.Generator().manual_seed(
                self.seed * 1_000_003 + step + part * 7_919_000_017
            )
            for optimiser in optimisers:
                factor = _MUON if isinstance(optimiser, Muon) else 1.0
                for group in optimiser.param_groups:
                    group["lr"] = factor * self.rate(step)
            loss = loss_of(step, generator)
            if not bool(loss.isfinite()):  # the checkpoint must stay as it is
                raise FloatingPointError(f"{self.name}: the loss of step {step} is {float(loss)}")
            loss.backward()
            if parts > 1:
                _average_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            step += 1
            total, counted = total + float(loss.detach()), counted + 1
            if part:
                continue
            if self.ema:
                decay = min(self.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    for name, value in modules.state_dict().items():
                        if value.is_floating_point():
                            average[name].lerp_(value.to(average[name].dtype), 1 - decay)
                        else:  # batch norm's counter
                            average[name].copy_(value)
            if step % self.log_every == 0 or step == self.steps:
                self._log(step, total / counted, spent + time.monotonic() - start)
                total, counted = 0.0, 0
            if time.monotonic() - last > CHECKPOINT_SECONDS:
                save()
                last = time.monotonic()
        if not part:
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
