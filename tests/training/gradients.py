"""Run under torch.distributed.run with TOML and OUT: gradients of the run's first step."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from anystory_core.training.batches import load_batches
from anystory_core.training.config import load_config
from anystory_core.training.loop import Trainer

trainer = Trainer(load_config(Path(sys.argv[1])))
accelerator = trainer.accelerator
batches = load_batches(trainer.dataset, trainer.config, trainer.ranks, first_step=0)
batch = next(batches)
losses = trainer.stage(batch, trainer.noised(batch))
accelerator.backward(losses["loss"])
if accelerator.is_main_process:
    stage = accelerator.unwrap_model(trainer.stage)
    torch.save({n: p.grad for n, p in stage.trained() if p.grad is not None}, sys.argv[2])
accelerator.end_training()
