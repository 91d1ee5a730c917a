"""The loop: accelerate around a :class:`~.stages.Stage`, from a configuration to a weights file."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.index import Index
from ..data.schema import BadSamples
from ..errors import ConfigError, DataError
from . import checkpoints
from .batches import Batch, load_batches
from .cache import Encodings
from .config import TrainingConfig, seconds
from .curves import Curves, say
from .dataset import SampleDataset
from .hosts.frozen import load_frozen
from .hosts.unet import UNetInputs, attention_kernels
from .initial import build_trained_model
from .libraries import library
from .saving import Saver
from .schedule import alphas_cumprod
from .sheets import draw_sheet
from .stages import Noised, add_noise, build_stage, gumbel_seeds


def check_distribution(kind: str) -> None:
    """ConfigError for accelerate's ways to shard a model: they gather a module's weights when it is
    called, but the K and V maps and the routers are called from inside the U-Net's blocks."""
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ConfigError(
            f"run: accelerate is set to {kind}, which this trainer cannot use; choose plain data "
            "parallelism in `accelerate config` (see docs/training.md)"
        )


class Trainer:
    """One run. ``run()`` trains from the newest checkpoint to the end and exports."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        run = config.run
        self.folder = Path(run.folder)
        self._make_folder()
        self.accelerator = self._make_accelerator()
        check_distribution(self.accelerator.distributed_type.value)
        self.frozen = load_frozen(config.base)
        dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.frozen.to(self.accelerator.device, dtypes[run.precision])
        with self.accelerator.main_process_first():  # which leaves the index to the others
            index = Index.of(config.data.paths)
        self.dataset = SampleDataset(index, config, self.frozen.config)
        self.encodings = Encodings(self.frozen, config)
        self.alphas = alphas_cumprod()
        self.bad = BadSamples(say)

        model = build_trained_model(config, self.frozen)
        stage = build_stage(model, self.encodings, config)
        if run.compile:
            self.frozen.unet.compile()
        parameters = [p for _, p in stage.trained()]
        # Fused: one pass over all parameters; on a CPU the default is a loop over them.
        optimiser = torch.optim.AdamW(parameters, **config.optimiser.adamw, fused=True)
        self.stage, self.optimiser = self.accelerator.prepare(stage, optimiser)
        self.saver = Saver(config, self.accelerator, self.stage, self.optimiser)
        self.curves = Curves(self.accelerator, self.folder)
        self.step = self.saver.resume()

    def run(self) -> Path:
        """Train to the last step and export; returns the weights file."""
        run = self.config.run
        self.curves.begin()
        batches = load_batches(
            self.dataset,
            self.config,
            first_step=self.step,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        saved = time.monotonic()
        for losses in self._steps(batches):
            if self.step % run.log_every == 0 or self.step == run.steps:
                self.curves.add(self.step, losses)
            if run.sheet_every and self.step % run.sheet_every == 0:
                self._sheet()
            if self._agreed(time.monotonic() - saved > seconds(run.checkpoint_every)):
                self.saver.save(self.step)
                saved = time.monotonic()
        self.bad.summary()
        self.saver.save(self.step)
        file = self.saver.export(self.step)  # all processes take part, so before their group ends
        self.curves.end()
        return file

    def _agreed(self, due: bool) -> bool:
        """The main process's answer in all processes: each has its own clock, and one that waited
        at a checkpoint's barrier would wait for ever for those that trained on."""
        if self.accelerator.num_processes == 1:
            return due
        answer = [due]
        torch.distributed.broadcast_object_list(answer)
        return answer[0]

    def _steps(self, batches: Iterator[Batch]) -> Iterator[dict[str, float]]:
        """One optimiser step per turn; yields its mean losses."""
        run = self.config.run
        bar = self.curves.bar(run.steps, self.step)
        per_step = run.batch * run.accumulate * self.accelerator.num_processes
        while self.step < run.steps:
            started = time.monotonic()
            totals: dict[str, float] = {}
            for _ in range(run.accumulate):
                for name, value in self._micro_step(next(batches)).items():
                    totals[name] = totals.get(name, 0.0) + value / run.accumulate
            self.step += 1
            rate = per_step / (time.monotonic() - started)
            bar.set_postfix_str(f"loss {totals['loss']:.4f}, {rate:.2f} samples/s")
            bar.update()
            lr = self.optimiser.param_groups[0]["lr"]
            yield {**totals, "learning_rate": lr, "samples_per_second": rate}
        bar.close()

    def _micro_step(self, batch: Batch) -> dict[str, float]:
        for error in (*batch.bad, *[""] * len(batch.numbers)):
            self.bad.note(DataError(error) if error else None)
        with self.accelerator.accumulate(self.stage):
            batch = batch.to(self.accelerator.device)
            noised = self.noised(batch)
            with self.accelerator.autocast(), attention_kernels(self.accelerator.device):
                losses: dict[str, Tensor] = self.stage(batch, noised)
            if not bool(torch.isfinite(losses["loss"])):
                raise ConfigError(
                    f"run: the loss became {float(losses['loss'])} at step {self.step + 1}; lower "
                    "optimiser.learning_rate, or set run.precision to 'bf16' or 'no'. The last "
                    "checkpoint is whole"
                )
            with attention_kernels(self.accelerator.device):  # recomputed blocks use the same
                self.accelerator.backward(losses["loss"])
            if self.accelerator.sync_gradients:
                parameters = [p for _, p in self.saver.stage.trained()]
                self.accelerator.clip_grad_norm_(parameters, self.config.optimiser.clip_norm)
                self._set_rate()
            self.optimiser.step()
            self.optimiser.zero_grad()
            if self.accelerator.sync_gradients:
                self.saver.average.update(self.step)
        return {name: float(value.detach()) for name, value in losses.items()}

    def noised(self, batch: Batch) -> Noised:
        """What the U-Net gets for a batch: a function of the samples' numbers."""
        device = self.accelerator.device
        clean = self.encodings.latents(batch, device).float()
        text, pooled = self.encodings.text(batch, device)
        seed = self.config.run.seed
        cubic = self.config.run.timesteps == "cubic"
        latents, noise, timesteps = add_noise(clean, batch.numbers, seed, self.alphas, cubic=cubic)
        dtype = self.frozen.unet.dtype
        inputs = UNetInputs(
            latents.to(dtype), timesteps, text.to(dtype), pooled.to(dtype), batch.time_ids
        )
        return Noised(inputs, noise, gumbel_seeds(seed, batch.numbers))

    def _set_rate(self) -> None:
        settings = self.config.optimiser
        warm = min(1.0, (self.step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        left = 1.0
        if settings.schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * self.step / self.config.run.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = settings.learning_rate * warm * left

    def _sheet(self) -> None:
        if self.accelerator.is_main_process:
            path = self.folder / "sheets" / f"step-{self.step:08d}.png"
            samples = [self.dataset[i] for i in range(min(4, len(self.dataset)))]
            batch = Batch.join(samples).to(self.accelerator.device)
            with self.accelerator.autocast():
                draw_sheet(self.saver.stage, batch, self.encodings, path)
        self.accelerator.wait_for_everyone()

    def _make_accelerator(self) -> Any:
        accelerate, utils = library("accelerate"), library("accelerate.utils")
        run = self.config.run
        return accelerate.Accelerator(
            mixed_precision=run.precision,
            gradient_accumulation_steps=run.accumulate,
            log_with="tensorboard",
            project_config=utils.ProjectConfiguration(
                project_dir=str(self.folder), logging_dir=str(self.folder / "logs")
            ),
            # Gradients live in the buckets that are sent: by default DDP keeps both.
            kwargs_handlers=[utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):  # each process has its own
                pass
        except OSError as error:
            raise checkpoints.CheckpointFolderError(
                f"run.folder: {self.folder} cannot be written ({error.strerror}); name another"
            ) from error
