"""Gradients of a run's first step; under torch.distributed.run of several, with TOML, OUT, TOML,
OUT ..."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from anystory_core.training.batches import load_batches
from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer


def save_gradients(toml: Path, out: Path) -> None:
    """As the optimiser would see them, by the main process, by name."""
    trainer = Trainer(load_config(toml))
    batches = load_batches(trainer.dataset, trainer.config, trainer.ranks, first_step=0)
    batch = next(batches)
    losses = trainer.stage(batch, trainer.noised(batch))
    trainer.accelerator.backward(losses["loss"])
    if trainer.accelerator.is_main_process:
        stage = trainer.accelerator.unwrap_model(trainer.stage)
        torch.save({n: p.grad for n, p in stage.trained() if p.grad is not None}, out)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    for toml, out in zip(paths[::2], paths[1::2], strict=True):
        save_gradients(toml, out)
    PartialState().destroy_process_group()
