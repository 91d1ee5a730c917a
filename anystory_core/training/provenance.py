"""What made a checkpoint or a weights file: the run's settings, its step, the versions of what it
ran on, and the state of this project's repository."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..bases.sdxl.config import AnyStoryConfig
from ..errors import ConfigError
from .config import TrainingConfig

_LIBRARIES = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "kornia")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """``settings``: the run's :class:`~.config.TrainingConfig` as tables. ``model``: the sizes of
    what is trained, as JSON. ``code``: the commit, and whether files differ from it."""

    stage: str
    step: int
    processes: int
    settings: Mapping[str, Any]
    model: str
    versions: Mapping[str, str]
    code: str

    @classmethod
    def of(
        cls, config: TrainingConfig, model: AnyStoryConfig, *, step: int, processes: int
    ) -> Provenance:
        """Of a run as it is."""
        settings = cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))
        return cls(
            stage=config.stage,
            step=step,
            processes=processes,
            settings=settings,
            model=model.to_json(),
            versions=_versions(),
            code=_code(),
        )

    @classmethod
    def read(cls, path: Path) -> Provenance:
        """Of a checkpoint. OSError or ValueError: it cannot be read."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path.name} is not of this version ({error})") from error

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @property
    def header(self) -> dict[str, str]:
        """What a weights file says of it. Paths are cut to names: files are handed on."""
        kept = dataclasses.asdict(self)
        kept["settings"] = _without_folders(kept["settings"])
        del kept["model"]
        return {
            f"anystory.{self.stage}_steps": str(self.step),
            f"anystory.{self.stage}_training": json.dumps(kept, separators=(",", ":")),
        }

    @property
    def subject_file(self) -> Path | None:
        """The file of stage 1 that a router was trained on."""
        router = self.settings.get("router")
        return Path(router["subject_file"]) if router else None

    def anystory_config(self) -> AnyStoryConfig:
        """The sizes of what is trained. ConfigError: they are no configuration."""
        return AnyStoryConfig.from_json(self.model)

    def differences(self, now: Provenance) -> list[str]:
        """What another start of the run changes, as "name = new, before old"."""
        own, other = self._flat(), now._flat()
        return [
            f"{name} = {other.get(name)}, before {own.get(name)}"
            for name in dict.fromkeys((*own, *other))
            if own.get(name) != other.get(name)
        ]

    def _flat(self) -> dict[str, Any]:
        versions = {f"version of {name}": text for name, text in self.versions.items()}
        flat = _flat(self.settings)
        return {**flat, "processes": self.processes, "code": self.code, **versions}


def shared_settings(config: TrainingConfig) -> dict[str, Any]:
    """A run's settings by dotted name, with paths cut to names: those of any of its machines."""
    return _flat(_without_folders(json.loads(json.dumps(dataclasses.asdict(config)))))


def _flat(table: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= _flat(cast("dict[str, Any]", value), f"{where}{name}.")
        else:
            found[where + name] = value
    return found


def _without_folders(value: Any) -> Any:
    """Settings with every absolute path cut to its last name."""
    if isinstance(value, dict):
        return {k: _without_folders(v) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_without_folders(v) for v in cast("list[Any]", value)]
    absolute = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if absolute else value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _code() -> str:
    """The repository's commit, with a + where files differ from it; "" where there is none."""
    folder = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def check_stage(made: Provenance, config: TrainingConfig, folder: Path) -> None:
    """ConfigError unless a checkpoint is of the run's stage."""
    if made.stage != config.stage:
        raise ConfigError(
            f"run.folder: {folder} holds a run of stage {made.stage!r}, this one is "
            f"{config.stage!r}; name another folder"
        )
