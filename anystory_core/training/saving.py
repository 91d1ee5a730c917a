"""What a run keeps: checkpoints that it goes on from, and the weights file that it ends with.

The main process alone reads and writes; the others give it what they hold and get what it read, so
that machines need not share a folder and all begin from the same step and weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..tensor_files import save_tensors
from . import checkpoints
from .average import Average
from .config import TrainingConfig
from .export import AVERAGE, PROVENANCE, WEIGHTS, write_weights
from .optimisers import load_state, read_state
from .provenance import Provenance, check_stage
from .ranks import Ranks
from .sharding import fill, whole
from .stages import Stage

_OPTIMISER = "optimiser.pt"  # in a checkpoint


class Saver:
    """Reads and writes the run's state; all processes call its methods together.

    ``stage`` and ``optimisers`` are as accelerate prepared them."""

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Any,
        ranks: Ranks,
        stage: Any,
        optimisers: Sequence[Any],
    ) -> None:
        self.config, self.accelerator, self.ranks = config, accelerator, ranks
        self._prepared, self._optimisers = stage, optimisers
        self.folder = Path(config.run.folder)
        self._checkpoints = self.folder / "checkpoints"
        self._saved = -1  # step of the newest checkpoint
        self.average = Average(self.stage.trained, config.optimiser.ema)

    @property
    def stage(self) -> Stage:
        """The stage itself, without what accelerate put around it."""
        return cast(Stage, self.accelerator.unwrap_model(self._prepared))

    def newest(self) -> Provenance | None:
        """What the newest checkpoint says of its run, None without one."""

        def read() -> Provenance | None:
            found = checkpoints.newest(self._checkpoints)
            if found is None:
                return None
            with checkpoints.reading(found[1]):
                return Provenance.read(found[1] / PROVENANCE)

        return self.ranks.on_main(read)

    def resume(self, made: Provenance) -> None:
        """Go on from the newest checkpoint, which says this of its run. ConfigError: it is of
        another stage."""
        step = made.step
        check_stage(made, self.config, self.folder)
        path = self._checkpoints / f"step-{step:08d}"
        shapes = {name: p.shape for name, p in self.stage.trained()}
        read: dict[str, dict[str, Any]] = {}  # of the main process; empty in the others

        def read_all() -> bool:
            with checkpoints.reading(path):
                read["weights"] = checkpoints.read_weights(path / WEIGHTS, shapes)
                averaged = bool(self.average) and (path / AVERAGE).exists()
                if averaged:
                    read["averages"] = checkpoints.read_weights(path / AVERAGE, shapes)
                read["kept"] = torch.load(path / _OPTIMISER, map_location="cpu", weights_only=True)
            return averaged

        averaged = self.ranks.on_main(read_all)
        weights, averages = read.get("weights", {}), read.get("averages", {})
        for name, target in self.stage.trained():
            fill(target, weights.get(name), self.ranks)
        self.average.begin()
        if averaged:
            for name, target in self.average.tensors.items():
                fill(target, averages.get(name), self.ranks)
        kept = read.get("kept", {})
        if made.settings["optimiser"]["name"] == self.config.optimiser.name:  # else it begins anew
            with checkpoints.reading(path):
                named = dict(self.stage.trained())
                load_state(self._optimisers, named, kept.get("optimiser"), self.ranks)
        scaler = self.ranks.broadcast(kept.get("scaler"))
        if scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        self._saved = step

    def save(self, step: int) -> None:
        """Write the checkpoint of this step, unless it is there; of step 0 there is nothing to
        keep."""
        if step in (0, self._saved):
            return
        trained = self._gathered(self.stage.trained())
        averages = self._gathered(self.average.tensors.items())
        named = dict(self.stage.trained())
        optimiser = read_state(self._optimisers, named, self._gather)
        scaler = self.accelerator.scaler
        kept: dict[str, Any] = {
            "optimiser": optimiser,
            "scaler": {} if scaler is None else scaler.state_dict(),
        }
        made = self.provenance(step)

        def fill_folder(path: Path) -> None:
            save_tensors(path / WEIGHTS, trained, {})
            if self.average:
                save_tensors(path / AVERAGE, averages, {})
            torch.save(kept, path / _OPTIMISER)
            made.write(path / PROVENANCE)

        keep = self.config.run.keep_checkpoints
        self.ranks.on_main(lambda: checkpoints.write(self._checkpoints, step, keep, fill_folder))
        self._saved = step

    def export(self, step: int) -> Path:
        """Write what the stage trained, averaged if there is an average; after stage 2 also the
        file joined with stage 1's. The file that LoadAnyStory should read."""
        named = self.average.tensors or dict(self.stage.trained())
        tensors = {name: x.float() for name, x in self._gathered(named.items()).items()}
        made = self.provenance(step)
        return self.ranks.on_main(lambda: write_weights(tensors, made, self.folder))

    def _gathered(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors, whole and in the machine's memory, in the main process; none in the others."""
        every = ((name, self._gather(x)) for name, x in named)
        return {name: x for name, x in every if self.ranks.main}

    def _gather(self, x: Tensor) -> Tensor:
        """One of them; of no size where it is not written."""
        full = whole(x)
        return full.cpu() if self.ranks.main else full.new_empty(0)

    def provenance(self, step: int) -> Provenance:
        """What this run says of itself at a step."""
        return Provenance.of(
            self.config, self.stage.model.config, step=step, processes=self.ranks.count
        )
