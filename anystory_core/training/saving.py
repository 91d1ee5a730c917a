"""What a run keeps: checkpoints that it goes on from, and the weights file that it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..tensor_files import save_tensors
from ..weights.checkpoint import save_model
from ..weights.merge import merge_files
from ..weights.model import PARTS
from . import checkpoints
from .average import Average
from .config import TrainingConfig
from .initial import ROUTER_PARTS
from .stages import Stage

_WEIGHTS = "model.safetensors"  # in a checkpoint
_AVERAGE = "average.safetensors"


class Saver:
    """Reads and writes the run's state through ``accelerator``; all processes call its methods.

    ``stage`` and ``optimiser`` are as accelerate prepared them."""

    def __init__(
        self, config: TrainingConfig, accelerator: Any, stage: Any, optimiser: Any
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self._prepared, self._optimiser = stage, optimiser
        self.folder = Path(config.run.folder)
        self._checkpoints = self.folder / "checkpoints"
        self._saved = -1  # step of the newest checkpoint
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)
        self.average = Average(self.stage.trained, config.optimiser.ema)

    @property
    def stage(self) -> Stage:
        """The stage itself, without what accelerate put around it."""
        return cast(Stage, self.accelerator.unwrap_model(self._prepared))

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one; its step, else 0."""
        found = checkpoints.newest(self._checkpoints)
        if found is None:
            return 0
        self._saved, path = found
        with checkpoints.reading(path):
            self.accelerator.load_state(str(path))
            self.average.load(path / _AVERAGE)
        # The file's settings count, not the checkpoint's.
        for group in self._optimiser.param_groups:
            group.update(self.config.optimiser.adamw)
        # accelerate counts micro-batches on from where it was, and ``accumulate`` may be another
        # now; a checkpoint is always between two steps.
        self.accelerator.step = 0
        self.accelerator.print(f"resuming from step {self._saved}")
        return self._saved

    def save(self, step: int) -> None:
        """Write the checkpoint of this step, unless it is there."""
        if self._saved == step:
            return

        def fill(path: Path) -> None:
            self.accelerator.wait_for_everyone()  # until the main process has made the folder
            self.accelerator.save_state(str(path))
            if self.accelerator.is_main_process:
                self.average.save(path / _AVERAGE)
            self.accelerator.wait_for_everyone()

        if self.accelerator.is_main_process:
            checkpoints.write(self._checkpoints, step, self.config.run.keep_checkpoints, fill)
        else:
            fill(checkpoints.partial(self._checkpoints, step))
        self._saved = step
        self.accelerator.wait_for_everyone()

    def export(self, step: int) -> Path:
        """Write what the stage trained; after stage 2 also the file joined with stage 1's.

        Returns the file that LoadAnyStory should read."""
        state: dict[str, Tensor] = self.accelerator.get_state_dict(self._prepared)
        config = self.config
        state = {**state, **self.average.tensors}
        wanted = ROUTER_PARTS if config.router is not None else tuple(PARTS)
        prefixes = tuple(PARTS[part] for part in wanted)
        chosen = {n: t.float() for n, t in state.items() if n.startswith(prefixes)}
        path = self.folder / f"anystory_{config.stage}.safetensors"
        result = path
        if self.accelerator.is_main_process:
            metadata = {f"anystory.{config.stage}_steps": str(step)}
            save_model(path, chosen, self.stage.model.config, metadata=metadata)
            if config.router is not None:
                result = self.folder / "anystory.safetensors"
                merge_files((config.router.subject_file, path), result)
        self.accelerator.wait_for_everyone()
        return result

    def _save_weights(self, models: list[Any], weights: list[Any], folder: str) -> None:
        """Instead of accelerate's: the trained weights alone, by their names in a weights file."""
        weights.clear()
        if self.accelerator.is_main_process:
            trained = {n: p.detach().cpu().contiguous() for n, p in self.stage.trained()}
            save_tensors(Path(folder) / _WEIGHTS, trained, {})

    def _load_weights(self, models: list[Any], folder: str) -> None:
        models.clear()
        checkpoints.load_weights(Path(folder) / _WEIGHTS, self.stage.trained())
