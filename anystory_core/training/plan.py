"""What a run is about to do, in words: sizes, steps, memory, and what differs from before."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .config import TrainingConfig
from .optimisers import state_bytes
from .provenance import Provenance
from .ranks import Ranks
from .samples import Pools
from .sharding import local
from .stages import Stage


def describe(config: TrainingConfig, pools: Pools, stage: Stage, ranks: Ranks) -> list[str]:
    """Lines for the terminal at the start of a run."""
    run = config.run
    together = ranks.count * run.batch * run.accumulate
    trained = sum(p.numel() for _, p in stage.trained())
    return [
        f"{ranks.count} process{'es' * (ranks.count > 1)} x batch {run.batch} x accumulate "
        f"{run.accumulate} = {together} samples a step, {run.steps} steps",
        f"{len(pools)} samples: {len(pools) / together:.1f} steps an epoch, "
        f"{run.steps * together / len(pools):.1f} epochs",
        *pools.notes,
        f"base: {stage.frozen.prediction} is predicted",
        f"{trained / 1e6:.1f} M trained parameters in {trained_names(stage)}",
        f"memory of each process before activations: {static_memory(stage) / 2**30:.1f} GiB",
    ]


def trained_names(stage: Stage) -> str:
    """The top-level modules that hold trained parameters."""
    return ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in stage.trained()))


def static_memory(stage: Stage) -> int:
    """Bytes of the frozen networks and of what is trained, with gradients and the optimiser's
    states, as they lie in one process."""
    config = stage.config
    frozen = sum(_bytes(module.parameters()) for module in stage.frozen.modules)
    own = _bytes(p for p in stage.parameters() if not p.requires_grad)
    trained = [local(p) for _, p in stage.trained()]
    states = 2 * _bytes(trained) + state_bytes(trained, config.optimiser)
    average = 4 * sum(p.numel() for p in trained) if config.optimiser.ema else 0
    return frozen + own + states + average


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in map(local, parameters))


def changes(before: Provenance, now: Provenance) -> list[str]:
    """What another start of a run changes, as lines for the terminal."""
    lines = [f"  {line}" for line in before.differences(now)]
    if lines:
        lines.insert(0, "since its checkpoint was written, these have changed:")
    per_step = [_per_step(made) for made in (before, now)]
    if per_step[0] != per_step[1]:
        lines.append(
            f"a step is {per_step[1]} samples now, {per_step[0]} before: from here on the run sees "
            "other samples than it would have"
        )
    return lines


def _per_step(made: Provenance) -> int:
    run = made.settings["run"]
    return made.processes * int(run["batch"]) * int(run["accumulate"])
