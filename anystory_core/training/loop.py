"""The loop: accelerate around a :class:`~.stages.Stage`, from a configuration to a weights file."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..data.index import DataError, Index
from ..data.schema import BadSamples
from ..errors import ConfigError
from ..tensor_files import open_tensors, save_tensors
from ..weights.checkpoint import save_model
from ..weights.merge import merge_files
from ..weights.model import PARTS
from . import checkpoints
from .batches import Batch, SampleDataset, load_batches
from .cache import Encodings
from .config import TrainingConfig, seconds
from .hosts.base import load_base
from .hosts.unet import attention_kernels
from .initial import ROUTER_PARTS, build_trained_model
from .schedule import alphas_cumprod
from .sheets import draw_sheet
from .stages import Noised, Stage, add_noise, build_stage, gumbel_seeds

_AVERAGE = "average.safetensors"  # in a checkpoint


def check_distribution(kind: str) -> None:
    """ConfigError for accelerate's ways to shard a model: they gather a module's weights when it is
    called, but the K and V maps and the routers are called from inside the U-Net's blocks."""
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ConfigError(
            f"run: accelerate is set to {kind}, which this trainer cannot use; choose plain data "
            "parallelism in `accelerate config` (see docs/training.md)"
        )


def _say(text: str) -> None:
    """A line above the progress bar."""
    from tqdm import tqdm

    cast(Any, tqdm).write(text, file=sys.stderr)


class Trainer:
    """One run. ``run()`` trains from the newest checkpoint to the end and exports."""

    def __init__(self, config: TrainingConfig) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

        self.config = config
        run = config.run
        self.folder = Path(run.folder)
        self._make_folder()
        project = cast(Any, ProjectConfiguration)(
            project_dir=str(self.folder), logging_dir=str(self.folder / "logs")
        )
        self.accelerator = cast(Any, Accelerator)(
            mixed_precision=run.precision,
            gradient_accumulation_steps=run.accumulate,
            log_with="tensorboard",
            project_config=project,
            # Gradients live in the buckets that are sent: by default DDP keeps both.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        check_distribution(self.accelerator.distributed_type.value)
        self.accelerator.register_save_state_pre_hook(self._save_weights)
        self.accelerator.register_load_state_pre_hook(self._load_weights)
        self.base = load_base(config.base)
        dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.base.to(self.accelerator.device, dtypes[run.precision])
        self.dataset = SampleDataset(Index.of(config.data.paths), config, self.base.config)
        self.encodings = Encodings(self.base, config)
        self.alphas = alphas_cumprod()
        self.bad = BadSamples(_say)

        model = build_trained_model(config, self.base)
        stage = build_stage(model, self.encodings, config)
        if run.compile:
            self.base.unet.compile()
        parameters = [p for _, p in stage.trained()]
        # Fused: one pass over all parameters; on a CPU the default is a loop over them.
        optimiser = torch.optim.AdamW(parameters, **config.optimiser.adamw, fused=True)
        self.stage, self.optimiser = self.accelerator.prepare(stage, optimiser)
        self.step = 0
        self._saved = -1  # step of the newest checkpoint
        self.average = self._begin_average(self._resume())

    def run(self) -> Path:
        """Train to the last step and export; returns the weights file."""
        run = self.config.run
        with self._logging():
            self.accelerator.init_trackers("training")
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
                self._log(losses)
            if run.sheet_every and self.step % run.sheet_every == 0:
                self._sheet()
            if self._agreed(time.monotonic() - saved > seconds(run.checkpoint_every)):
                self.save()
                saved = time.monotonic()
        self.bad.summary()
        self.save()
        file = self.export()  # all processes take part, so before their group ends
        with self._logging():
            self.accelerator.end_training()
        return file

    def _logging(self) -> AbstractContextManager[None]:
        return checkpoints.writing("run.folder", "the curve of the losses", self.folder)

    def _agreed(self, due: bool) -> bool:
        """The main process's answer in all processes: each has its own clock, and one that waited
        at a checkpoint's barrier would wait for ever for those that trained on."""
        if self.accelerator.num_processes == 1:
            return due
        answer = [due]
        torch.distributed.broadcast_object_list(answer)
        return answer[0]

    def _log(self, losses: dict[str, float]) -> None:
        """To TensorBoard, and to ``losses.jsonl``; after a resume a step may be there twice."""
        with self._logging():
            self.accelerator.log({f"loss/{k}": v for k, v in losses.items()}, step=self.step)
            if self.accelerator.is_main_process:
                with open(self.folder / "losses.jsonl", "a") as file:
                    file.write(json.dumps({"step": self.step, **losses}) + "\n")

    def _steps(self, batches: Iterator[Batch]) -> Iterator[dict[str, float]]:
        """One optimiser step per turn; yields its mean losses."""
        from tqdm import tqdm

        run = self.config.run
        bar = cast(Any, tqdm)(
            mininterval=1.0,
            total=run.steps,
            initial=self.step,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
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
            batch = self._move(batch)
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
                parameters = [p for _, p in self._unwrapped().trained()]
                self.accelerator.clip_grad_norm_(parameters, self.config.optimiser.clip_norm)
                self._set_rate()
            self.optimiser.step()
            self.optimiser.zero_grad()
            if self.accelerator.sync_gradients:
                self._update_average()
        return {name: float(value.detach()) for name, value in losses.items()}

    def noised(self, batch: Batch) -> Noised:
        """What the U-Net gets for a batch: a function of the samples' numbers."""
        device = self.accelerator.device
        clean = self.encodings.latents(batch, device).float()
        text, pooled = self.encodings.text(batch, device)
        seed = self.config.run.seed
        cubic = self.config.run.timesteps == "cubic"
        latents, noise, timesteps = add_noise(clean, batch.numbers, seed, self.alphas, cubic=cubic)
        dtype = self.base.unet.dtype
        return Noised(
            latents.to(dtype),
            noise,
            timesteps,
            text.to(dtype),
            pooled.to(dtype),
            batch.time_ids,
            gumbel_seeds(seed, batch.numbers),
        )

    def _move(self, batch: Batch) -> Batch:
        device = self.accelerator.device
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(batch).items()
        }
        return Batch(**moved)

    def _set_rate(self) -> None:
        settings = self.config.optimiser
        warm = min(1.0, (self.step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        left = 1.0
        if settings.schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * self.step / self.config.run.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = settings.learning_rate * warm * left

    def _update_average(self) -> None:
        target = self.config.optimiser.ema
        if not target:
            return
        decay = min(target, (1 + self.step) / (10 + self.step))
        for name, parameter in self._unwrapped().trained():
            self.average[name].lerp_(parameter.detach().float(), 1 - decay)

    def _unwrapped(self) -> Stage:
        return cast(Stage, self.accelerator.unwrap_model(self.stage))

    def _sheet(self) -> None:
        if self.accelerator.is_main_process:
            path = self.folder / "sheets" / f"step-{self.step:08d}.png"
            samples = [self.dataset[i] for i in range(min(4, len(self.dataset)))]
            with self.accelerator.autocast():
                draw_sheet(self._unwrapped(), self._move(Batch.of(samples)), self.encodings, path)
        self.accelerator.wait_for_everyone()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):  # each process has its own
                pass
        except OSError as error:
            raise checkpoints.CheckpointFolderError(
                f"run.folder: {self.folder} cannot be written ({error.strerror}); name another"
            ) from error

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def save(self) -> None:
        """Write the checkpoint of this step, unless it is there. All processes take part."""
        if self._saved == self.step:
            return

        def fill(path: Path) -> None:
            self.accelerator.wait_for_everyone()  # until the main process has made the folder
            self.accelerator.save_state(str(path))
            if self.accelerator.is_main_process and self.config.optimiser.ema:
                save_tensors(path / _AVERAGE, self.average, {})
            self.accelerator.wait_for_everyone()

        if self.accelerator.num_processes == 1 or self.accelerator.is_main_process:
            checkpoints.write(self._checkpoints, self.step, self.config.run.keep_checkpoints, fill)
        else:
            fill(self._checkpoints / f"step-{self.step:08d}.partial")
        self._saved = self.step
        self.accelerator.wait_for_everyone()

    def _save_weights(self, models: list[Any], weights: list[Any], folder: str) -> None:
        """Instead of accelerate's: the trained weights alone, by their names in a weights file."""
        weights.clear()
        if self.accelerator.is_main_process:
            trained = {n: p.detach().cpu().contiguous() for n, p in self._unwrapped().trained()}
            save_tensors(Path(folder) / "model.safetensors", trained, {})

    def _load_weights(self, models: list[Any], folder: str) -> None:
        models.clear()
        checkpoints.load_weights(Path(folder) / "model.safetensors", self._unwrapped().trained())

    def _resume(self) -> Path | None:
        """Load the newest checkpoint, if there is one; its folder."""
        found = checkpoints.newest(self._checkpoints)
        if found is None:
            return None
        self.step, path = found
        self._saved = self.step
        with checkpoints.reading(path):
            self.accelerator.load_state(str(path))
        for group in self.optimiser.param_groups:  # the file's settings count, not the checkpoint's
            group.update(self.config.optimiser.adamw)
        # accelerate counts micro-batches on from where it was, and ``accumulate`` may be another
        # now; a checkpoint is always between two steps.
        self.accelerator.step = 0
        self.accelerator.print(f"resuming from step {self.step}")
        return path

    def _begin_average(self, checkpoint: Path | None) -> dict[str, Tensor]:
        """The moving average as the checkpoint has it; where it has none, the weights."""
        if not self.config.optimiser.ema:
            return {}
        average = {n: p.detach().float().clone() for n, p in self._unwrapped().trained()}
        if checkpoint is not None and (checkpoint / _AVERAGE).exists():
            with checkpoints.reading(checkpoint), open_tensors(checkpoint / _AVERAGE) as file:
                for name, tensor in average.items():
                    tensor.copy_(file.get_tensor(name))
        return average

    def export(self) -> Path:
        """Write what the stage trained; after stage 2 also the file joined with stage 1's.

        Returns the file that LoadAnyStory should read."""
        state: dict[str, Tensor] = self.accelerator.get_state_dict(self.stage)
        config = self.config
        if config.optimiser.ema:
            state = {**state, **self.average}
        wanted = ROUTER_PARTS if config.router is not None else tuple(PARTS)
        prefixes = tuple(PARTS[part] for part in wanted)
        chosen = {n: t.float() for n, t in state.items() if n.startswith(prefixes)}
        path = self.folder / f"anystory_{config.stage}.safetensors"
        result = path
        if self.accelerator.is_main_process:
            metadata = {f"anystory.{config.stage}_steps": str(self.step)}
            save_model(path, chosen, self._unwrapped().model.config, metadata=metadata)
            if config.router is not None:
                result = self.folder / "anystory.safetensors"
                merge_files((config.router.subject_file, path), result)
        self.accelerator.wait_for_everyone()
        return result
