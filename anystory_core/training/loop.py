"""The loop: accelerate around a :class:`~.stages.Stage`, from a configuration to a weights file."""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from ..errors import ConfigError
from ..weights.fingerprint import weights_fingerprint
from . import checkpoints
from .batches import Batch, load_batches
from .cache import Encodings
from .compiled import compile_blocks
from .config import TrainingConfig
from .corrupt import CorruptSamples
from .curves import Curves, say
from .dataset import SampleDataset, sample_seed
from .hosts.frozen import load_frozen
from .hosts.unet import attention_kernels
from .initial import build_trained_model
from .libraries import library
from .noise import Noised, draw_noise, draw_timesteps, gumbel_seeds, make_noised
from .optimisers import build_optimisers, set_rate
from .order import Order
from .plan import changes, describe
from .provenance import shared_settings
from .ranks import Ranks, on_cpu
from .samples import Samples, draw_pools
from .saving import Saver
from .schedule import Schedule
from .settings import seconds
from .shapes import into_buckets, sizes_of
from .sharding import shard, whole
from .sheets import ROWS, draw_sheet, save_sheet
from .stages import Stage, build_stage
from .stopping import Stopped, Stopping
from .validation import Validation


class Trainer:
    """One run. ``run()`` trains from the newest checkpoint to the end and exports."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        run = config.run
        self.folder = Path(run.folder)
        self.accelerator = self._make_accelerator()
        check_distribution(self.accelerator.distributed_type.value)
        self.ranks = Ranks(self.accelerator.device)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if not self.accelerator.num_processes == self.ranks.count == started:
            raise ConfigError(
                f"run: {started} processes were started, of which {self.ranks.count} have found "
                f"each other, {self.accelerator.num_processes} for training; start them with "
                "`accelerate launch`"
            )
        self.ranks.on_main(lambda: make_folder(self.folder))
        self.frozen = load_frozen(config.base)
        dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.frozen.to(self.accelerator.device, dtypes[run.precision])
        self.schedule = Schedule(self.frozen.prediction)
        self.encodings = Encodings(self.frozen, config)

        # One process of each machine leaves the index of shards beside them to its others.
        with self.accelerator.local_main_process_first():
            samples = Samples.of([origin.path for origin in config.data.origins])
        self.pools = draw_pools(samples, config)
        self.dataset = self._make_dataset(samples)
        self.validation = self._make_validation(samples)
        self.corrupt = CorruptSamples(len(self.pools), say)
        self._check_agreement(len(samples))

        model = build_trained_model(config, self.frozen)
        self.stage, self.optimisers = self._prepare(build_stage(model, self.encodings, config))
        self.saver = Saver(config, self.accelerator, self.ranks, self.stage, self.optimisers)
        batch = self.ranks.count * run.batch * run.accumulate
        self.curves = Curves(self.accelerator, self.ranks, config, batch)
        self.step = self._resume()

    def run(self) -> Path:
        """Train to the last step and export; returns the weights file. Stopped: the run was asked
        to end, and has saved."""
        run = self.config.run
        if self.ranks.main:
            for line in describe(self.config, self.pools, self.saver.stage, self.ranks):
                say(line)
        self.curves.begin(run.steps, self.step)
        batches = load_batches(self.dataset, self.config, self.ranks, first_step=self.step)
        with Stopping() as stopping:
            self._train(batches, stopping)
        self.corrupt.summary()
        self.saver.save(self.step)
        file = self.saver.export(self.step)  # all processes take part, so before their group ends
        self.curves.end()
        return file

    def _train(self, batches: Iterator[Batch], stopping: Stopping) -> None:
        run = self.config.run
        every, saved = seconds(run.checkpoint_every), time.monotonic()
        while self.step < run.steps:
            for _ in range(run.accumulate):
                if self.ranks.any(stopping.asked)[0]:
                    self._stop()
                self._micro_step(next(batches))
            self.step += 1
            self.curves.advance()
            if self.step % run.log_every == 0 or self.step == run.steps:
                self.curves.log(self.step, float(self.optimisers[0].param_groups[0]["lr"]))
            if self._due(self.config.validation.every) and self.validation is not None:
                self._validate(self.validation)
            if self._due(run.sheet_every):
                self._sheet()
            # The main process's clock counts: each has its own.
            if self.ranks.any(self.ranks.main and time.monotonic() - saved > every)[0]:
                self.saver.save(self.step)
                saved = time.monotonic()

    def _stop(self) -> None:
        self.saver.save(self.step)
        raise Stopped(
            f"the run was asked to end and has saved step {self.step}; the same command goes on "
            "from there"
        )

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.config.run.steps)

    def _micro_step(self, batch: Batch) -> None:
        self.corrupt.note(batch.bad)
        with self.accelerator.accumulate(self.stage):
            batch = batch.to(self.accelerator.device)
            noised = self.noised(batch)
            with (
                self.accelerator.autocast(),
                attention_kernels(self.accelerator.device),
                self._offloaded(),
            ):
                losses: dict[str, Tensor] = self.stage(batch, noised)
            if not bool(torch.isfinite(losses["loss"])):
                raise ConfigError(
                    f"run: the loss became {float(losses['loss'])} at step {self.step + 1}; lower "
                    "optimiser.learning_rate, or set run.precision to 'bf16' or 'no'. The last "
                    "checkpoint is whole"
                )
            self.curves.means.add(losses)
            with attention_kernels(self.accelerator.device):  # recomputed blocks use the same
                self.accelerator.backward(losses["loss"])
            if self.accelerator.sync_gradients:
                parameters = [p for _, p in self.saver.stage.trained()]
                norm = self.accelerator.clip_grad_norm_(parameters, self.config.optimiser.clip_norm)
                self.curves.means.add({"gradient_norm": whole(norm)})
                self._set_rate()
                # Rounding at random must be the same in all processes, and after a resume.
                cast(Any, torch).manual_seed(sample_seed(self.config.run.seed, self.step))
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad()
            if self.accelerator.sync_gradients:
                self.saver.average.update(self.step)

    def noised(self, batch: Batch) -> Noised:
        """What the U-Net gets for a batch: a function of the samples' numbers."""
        seed, numbers = self.config.run.seed, batch.numbers
        encoded = self.encodings.encode(batch)
        steps, kind = len(self.schedule), self.config.run.timesteps
        timesteps = draw_timesteps(numbers, seed, steps, kind)
        shape, offset = encoded.latents.shape[1:], self.config.loss.noise_offset
        noise = draw_noise(shape, numbers, seed, offset=offset)
        return make_noised(self.schedule, encoded, noise, timesteps, gumbel_seeds(seed, numbers))

    def _set_rate(self) -> None:
        settings = self.config.optimiser
        warm = min(1.0, (self.step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        left = 1.0
        if settings.schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * self.step / self.config.run.steps))
        set_rate(self.optimisers, settings.learning_rate * warm * left)

    def _validate(self, validation: Validation) -> None:
        def measure(batch: Batch, noised: Noised) -> dict[str, Tensor]:
            with self.accelerator.autocast(), attention_kernels(self.accelerator.device):
                return self.stage(batch, noised, measure=True)

        self.curves.add(self.step, "validation", validation.run(measure, self.ranks))

    def _sheet(self) -> None:
        """Of fixed samples, unchanged, by the averaged weights where there are any. All processes
        draw it, as sharded weights need; one writes it."""
        dataset = self.dataset if self.validation is None else self.validation.dataset
        plain = SampleDataset(
            dataset.samples, dataset.order, self.config, self.frozen.config, plain=True
        )  # squares, which go side by side
        rows = [plain[i] for i in range(min(ROWS, len(plain.order)))]
        batch = Batch.join(rows).to(self.accelerator.device)
        with self.accelerator.autocast(), self.saver.average.applied():
            sheet = draw_sheet(self.saver.stage, batch, self.encodings)
        path = self.folder / "sheets" / f"step-{self.step:08d}.png"
        self.ranks.on_main(lambda: save_sheet(sheet, path))
        self.curves.add_pictures(self.step, "sheet", torch.as_tensor(np.array(sheet))[None])

    def _make_dataset(self, samples: Samples) -> SampleDataset:
        run, data, pools = self.config.run, self.config.data, self.pools
        model = self.frozen.config
        if data.shapes == "square":
            order = Order(pools.positions, pools.shares, run.seed)
            return SampleDataset(samples, order, self.config, model)
        known = np.unique(np.concatenate(pools.positions))
        file = self.folder / "sizes.npz"
        sizes = self.ranks.on_main(lambda: sizes_of(samples, known, file))
        shaped = into_buckets(pools, known, sizes, data.resolution, run.batch)
        # The samples of one batch have one shape.
        order = Order(shaped.positions, shaped.shares, run.seed, unit=run.batch)
        return SampleDataset(samples, order, self.config, model, shapes=shaped.shapes)

    def _make_validation(self, samples: Samples) -> Validation | None:
        settings = self.config.validation
        if not settings.every:
            return None
        positions = self.pools.held_out
        if settings.paths:
            samples = Samples.of(settings.paths)
            positions = draw_pools(samples, self.config.for_validation()).positions[0]
        if not len(positions):
            return None
        order = Order([positions], [1.0], 0)
        dataset = SampleDataset(samples, order, self.config, self.frozen.config, plain=True)
        count = min(settings.samples, len(positions))
        return Validation(dataset, count, self.encodings, self.schedule)

    def _check_agreement(self, samples: int) -> None:
        """All processes train the same thing, whatever their machines hold."""
        same = self.ranks.same
        same("the settings", shared_settings(self.config), "give all processes the same file")
        same("the base", self.frozen.fingerprint, "give all machines the same files")
        same("the number of samples", samples, "give all machines the same data")

    def _prepare(self, stage: Stage) -> tuple[Any, list[Any]]:
        """The stage and its optimisers as accelerate has them, on the device."""
        run = self.config.run
        first = weights_fingerprint(stage, self.frozen.unet)
        self.ranks.same("the weights to begin with", first, "give all machines the same files")
        sharded = run.shard and self.ranks.count > 1
        if sharded:
            shard(stage, "conditions")
        if run.compile:
            compile_blocks(self.frozen.unet, stage)
        optimisers = build_optimisers([p for _, p in stage.trained()], self.config.optimiser)
        if sharded:
            return stage, [self.accelerator.prepare(optimiser) for optimiser in optimisers]
        prepared, *rest = self.accelerator.prepare(stage, *optimisers)
        return prepared, rest

    def _offloaded(self) -> AbstractContextManager[Any]:
        """Activations that wait for the backward pass wait in the machine's memory, if asked."""
        if not self.config.run.offload_activations:
            return nullcontext()
        return save_on_cpu(pin_memory=self.accelerator.device.type == "cuda")

    def _resume(self) -> int:
        made = self.saver.newest()
        if made is None:
            return 0
        self.saver.resume(made)
        if self.ranks.main:
            say(f"resuming from step {made.step}")
            for line in changes(made, self.saver.provenance(made.step)):
                say(line)
        return made.step

    def _make_accelerator(self) -> Any:
        accelerate, utils = library("accelerate"), library("accelerate.utils")
        run = self.config.run
        for name in run.trackers:
            if importlib.util.find_spec(name) is None:  # accelerate would go on without it
                raise ConfigError(f"run.trackers: {name} is not installed; pip install {name}")
        return accelerate.Accelerator(
            cpu=on_cpu(),
            mixed_precision=run.precision,
            gradient_accumulation_steps=run.accumulate,
            log_with=list(run.trackers),
            project_config=utils.ProjectConfiguration(
                project_dir=str(self.folder), logging_dir=str(self.folder / "logs")
            ),
            # Gradients live in the buckets that are sent: by default DDP keeps both.
            kwargs_handlers=[utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )


def check_distribution(kind: str) -> None:
    """ConfigError for accelerate's own ways to shard a model: which modules are gathered when is
    this trainer's to say (:mod:`.sharding`)."""
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ConfigError(
            f"run: accelerate is set to {kind}, which this trainer cannot use; choose plain data "
            "parallelism in `accelerate config`, and run.shard = true (see docs/training.md)"
        )


def make_folder(folder: Path) -> None:
    """Make a run's folder. CheckpointFolderError: it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise checkpoints.CheckpointFolderError(
            f"run.folder: {folder} cannot be written ({error.strerror}); name another"
        ) from error
