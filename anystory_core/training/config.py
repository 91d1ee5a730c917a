"""A training run's settings: TOML -> frozen dataclasses. Unknown keys are refused by name.

Durations carry a unit ("10 min", "2 h"). Paths are relative to the TOML file.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import from_dict
from ..errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tokens = Literal["mean", "sum", "area"]  # of :class:`RouterSettings`

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The frozen base model; see :mod:`.hosts.frozen` for the layouts.

    ``path``: a folder (diffusers layout) or an SDXL single file. ``clip_vision``: folder of a
    transformers CLIP vision model; "" takes ``image_encoder/`` of the base folder. ``model``:
    "sdxl", "mini", or a JSON file of an ``AnyStoryConfig`` for a base of other sizes.
    """

    path: str
    clip_vision: str = ""
    model: str = "sdxl"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Samples; see docs/data.md. ``paths``: folders, or WebDataset shards (``*.tar``)."""

    paths: tuple[str, ...]
    resolution: int = 1024  # pictures are scaled and centre-cropped to this square
    max_subjects: int = 3  # scene samples keep the largest ones
    workers: int = 4
    # Folder for text states and target latents, and without augmentation for what the references
    # are encoded to as well; "" computes them every time.
    cache: str = ""
    mirror: bool = False  # flip half of the targets, with their masks

    def __post_init__(self) -> None:
        _bounds("data", self, least={"resolution": 8, "max_subjects": 1, "workers": 0})


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """Changes to the reference picture (paper 3.4), against copy-paste. Probabilities in [0,1]."""

    rotate: float = 0.5
    degrees: float = 30.0
    crop: float = 0.3
    least_kept: float = 0.6  # smallest side that a crop keeps, relative
    pad: float = 0.3
    most_padding: float = 0.3  # largest zero border added, relative to the side
    flip: float = 0.5
    colour: float = 0.0
    colour_amount: float = 0.1

    def __post_init__(self) -> None:
        shares = ("rotate", "crop", "pad", "flip", "colour", "least_kept", "colour_amount")
        _bounds("augment", self, shares=shares, least={"most_padding": 0})

    @property
    def changes(self) -> bool:
        """Whether a reference may ever be changed."""
        return any((self.rotate, self.crop, self.pad, self.flip, self.colour))


@dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """AdamW. The paper names the learning rate and the batch; the rest is torch's default."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: to zero at the last step
    clip_norm: float = 1.0
    ema: float = 0.0  # decay of the moving average; 0 keeps none

    def __post_init__(self) -> None:
        least = {"weight_decay": 0, "warmup_steps": 0}
        above = ("learning_rate", "epsilon", "clip_norm")
        _bounds("optimiser", self, least=least, above=above, below=("beta1", "beta2", "ema"))

    @property
    def adamw(self) -> dict[str, Any]:
        """What torch's AdamW calls them."""
        return {
            "lr": self.learning_rate,
            "betas": (self.beta1, self.beta2),
            "eps": self.epsilon,
            "weight_decay": self.weight_decay,
        }


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Length, size and bookkeeping of the run.

    ``timesteps``: "uniform" is Eq. 1; "cubic" draws noisy ones more often (T2I-Adapter, Mou et al.
    2023), where it is decided what a subject looks like, and learns that in fewer steps.
    """

    folder: str
    steps: int
    batch: int = 8  # samples per process and forward pass
    accumulate: int = 1
    seed: int = 0
    timesteps: Literal["uniform", "cubic"] = "uniform"
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    checkpointing: bool = True  # recompute activations in the backward pass
    compile: bool = False
    checkpoint_every: str = "10 min"
    keep_checkpoints: int = 3
    sheet_every: int = 0  # steps between picture sheets; 0 makes none
    sheet_steps: int = 20  # sampler steps of a sheet's samples
    log_every: int = 10

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "accumulate", "keep_checkpoints", "log_every", "sheet_steps")
        _bounds("run", self, least={**dict.fromkeys(counts, 1), "seed": 0, "sheet_every": 0})
        seconds(self.checkpoint_every, "run.checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class SubjectSettings:
    """Stage 1: the subject encoder. ``clip`` and ``reference`` switch a branch off (ablations).

    ``inside``: 0 is Eq. 1; errors inside the subject count 1 + inside times as much. It needs the
    subject's mask in the target (scenes have it, pairs by ``target_mask.png``). Stage 1 routes a
    subject everywhere, so on small subjects the mean over a picture is mostly about keeping out of
    the rest, which is the router's work."""

    clip: bool = True
    reference: bool = True
    inside: float = 0.0
    drop_clip: float = 0.1  # share of samples whose CLIP condition becomes the background's
    drop_text: float = 0.1  # share of samples whose caption becomes empty
    # CLIP tokens' QFormer and K and V maps from this file instead of a new one and the U-Net's own
    ip_adapter: str = ""
    start_file: str = ""  # go on from these AnyStory weights instead of the U-Net's

    def __post_init__(self) -> None:
        _bounds("subject", self, shares=("drop_clip", "drop_text"), least={"inside": 0})


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """Stage 2: the router, on the file of stage 1.

    ``tokens``: "mean" averages a map's squared error over its tokens, so that lambda weighs all
    blocks alike whatever their size; "sum" is Eq. 4 to the letter, where a block of 4096 tokens
    counts 4 times one of 1024 and lambda = 0.1 means a far larger share of the loss; "area" divides
    by what the map and the subject cover, so that small subjects count as much as large ones
    (:func:`~.losses.map_error`). ``mean_weight``: what the error of the masks that the mean map
    over all blocks gives counts besides (:func:`~.losses.mean_routing_loss`); 0 is the paper.
    ``refine``: off for the ablation of Fig. 6, where the coarse map is the route.
    """

    subject_file: str
    route_weight: float = 0.1  # lambda
    tokens: Tokens = "mean"
    mean_weight: float = 0.0
    drop_text: float = 0.1
    refine: bool = True
    start_file: str = ""  # go on from the router in these AnyStory weights

    def __post_init__(self) -> None:
        _bounds("router", self, shares=("drop_text",), least={"route_weight": 0, "mean_weight": 0})


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

    def __post_init__(self) -> None:
        if (self.subject is None) == (self.router is None):
            raise ConfigError("a run has one table of [subject] and [router]: which stage is it?")
        if self.subject is not None and not (self.subject.clip or self.subject.reference):
            raise ConfigError("subject: clip and reference are both off; nothing would be trained")

    @property
    def stage(self) -> str:
        """ "subject" or "router"."""
        return "subject" if self.subject is not None else "router"


def seconds(duration: str, field: str = "duration") -> float:
    """ "10 min" -> 600.0; ConfigError, naming ``field``, for anything but a number and s, min or
    h."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(s|min|h)\s*", duration, re.ASCII)
    if match is None:
        raise ConfigError(
            f"{field}: got {duration!r}, expected a number with s, min or h, such as '10 min'"
        )
    return float(match[1]) * _UNITS[match[2]]


def _bounds(
    table: str,
    settings: object,
    *,
    least: Mapping[str, int] | None = None,
    above: Sequence[str] = (),
    below: Sequence[str] = (),
    shares: Sequence[str] = (),
) -> None:
    """ConfigError for a value outside its range: not less than ``least``; ``above`` 0; from 0 to
    ``below`` 1; ``shares`` from 0 to 1. Values that are no number are none of these."""
    checks: list[tuple[str, Callable[[float], bool], str]] = [
        *((n, lambda x, low=low: x >= low, f"{low} or more") for n, low in (least or {}).items()),
        *((n, lambda x: x > 0, "more than 0") for n in above),
        *((n, lambda x: 0 <= x < 1, "0 or more, less than 1") for n in below),
        *((n, lambda x: 0 <= x <= 1, "0 to 1") for n in shares),
    ]
    for name, good, expected in checks:
        value = getattr(settings, name)
        if not (math.isfinite(value) and good(value)):
            raise ConfigError(f"{table}.{name}: got {value}, expected {expected}")


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
        return str((path.parent / Path(name).expanduser()).resolve()) if name else ""

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
            cache=absolute(config.data.cache),
        ),
        run=replace(config.run, folder=absolute(config.run.folder)),
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
