"""A training run's settings: TOML -> frozen dataclasses. Unknown keys are refused by name; paths
are relative to the TOML file."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..config import from_dict
from ..data.paths import is_remote
from ..errors import ConfigError
from .settings import (
    AugmentSettings,
    BaseSettings,
    DataSettings,
    LossSettings,
    OptimiserSettings,
    RouterSettings,
    RunSettings,
    SubjectSettings,
    ValidationSettings,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One run of one stage: exactly one of ``subject`` and ``router`` is set."""

    base: BaseSettings
    data: DataSettings
    run: RunSettings
    subject: SubjectSettings | None = None
    router: RouterSettings | None = None
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)

    def __post_init__(self) -> None:
        if (self.subject is None) == (self.router is None):
            raise ConfigError("a run has one table of [subject] and [router]: which stage is it?")
        if self.subject is not None and not (self.subject.clip or self.subject.reference):
            raise ConfigError("subject: clip and reference are both off; nothing would be trained")
        self._check_optimiser()

    def _check_optimiser(self) -> None:
        run, optimiser = self.run, self.optimiser
        if optimiser.weights == "bf16" and run.precision != "bf16":
            raise ConfigError(
                f"optimiser.weights: got 'bf16' with run.precision = {run.precision!r}; set that "
                "to 'bf16', too"
            )
        if run.precision == "fp16" and (run.shard or optimiser.name == "muon"):
            raise ConfigError(
                "run.precision: 'fp16' scales losses for one optimiser that sees whole gradients; "
                "with run.shard or optimiser.name = 'muon' set it to 'bf16'"
            )
        if run.shard and self.router is not None:
            raise ConfigError(
                "run.shard: is for stage 1; stage 2 trains a tenth of that, which fits into each "
                "process (docs/training.md). Leave it out"
            )
        if run.shard and optimiser.name != "adamw":
            raise ConfigError(
                f"run.shard: {optimiser.name!r} needs whole tensors; set optimiser.name to 'adamw'"
            )

    def for_validation(self) -> TrainingConfig:
        """The run with validation's own data in the place of its data, none of it held out."""
        replace = dataclasses.replace
        return replace(
            self,
            data=replace(self.data, paths=self.validation.paths, sources=()),
            validation=replace(self.validation, every=0, paths=()),
        )

    @property
    def stage(self) -> str:
        """ "subject" or "router"."""
        return "subject" if self.subject is not None else "router"


def load_config(path: Path) -> TrainingConfig:
    """Read a TOML file; paths in it become absolute. ConfigError names what is wrong, and where."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be opened ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error
    config = from_dict(TrainingConfig, table, path.name)

    def absolute(name: str) -> str:
        if not name or is_remote(name):
            return name
        return str((path.parent / Path(name).expanduser()).resolve())

    replace = dataclasses.replace
    named = config.base.model
    config = replace(
        config,
        base=replace(
            config.base,
            path=absolute(config.base.path),
            clip_vision=absolute(config.base.clip_vision),
            model=named if named in ("sdxl", "mini") else absolute(named),
        ),
        data=replace(
            config.data,
            paths=tuple(absolute(p) for p in config.data.paths),
            sources=tuple(replace(s, path=absolute(s.path)) for s in config.data.sources),
            cache=absolute(config.data.cache),
        ),
        run=replace(config.run, folder=absolute(config.run.folder)),
        validation=replace(
            config.validation, paths=tuple(absolute(p) for p in config.validation.paths)
        ),
    )
    if config.subject is not None:
        subject = config.subject
        files = absolute(subject.ip_adapter), absolute(subject.start_file)
        changed = replace(subject, ip_adapter=files[0], start_file=files[1])
        return replace(config, subject=changed)
    assert config.router is not None
    router = config.router
    files = absolute(router.subject_file), absolute(router.start_file)
    return replace(config, router=replace(router, subject_file=files[0], start_file=files[1]))
