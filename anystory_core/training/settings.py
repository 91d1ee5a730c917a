"""The tables of a training run's TOML, as frozen dataclasses that check themselves.

Durations carry a unit ("10 min", "2 h"). What is no setting of the paper's is off by default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

Tokens = Literal["mean", "sum", "area"]  # of :class:`RouterSettings`
Timesteps = Literal["uniform", "cubic"]  # of :class:`RunSettings`
OptimiserName = Literal["adamw", "adamw_8bit", "adafactor", "prodigy", "muon"]
Weights = Literal["float32", "bf16"]  # what is trained is held in
Tracker = Literal["tensorboard", "wandb"]

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The frozen base model; see :mod:`.hosts.frozen` for the layouts.

    ``path``: a folder (diffusers layout) or an SDXL single file. ``clip_vision``: folder of a
    transformers CLIP vision model; "" takes ``image_encoder/`` of the base folder. ``model``:
    "sdxl", "mini", or a JSON file of an ``AnyStoryConfig`` for a base of other sizes.
    ``prediction``: what the U-Net predicts, and whether its schedule ends in noise alone; files
    mostly say so themselves, folders in ``scheduler/``.
    """

    path: str
    clip_vision: str = ""
    model: str = "sdxl"
    prediction: Literal["from_file", "epsilon", "v", "v_zero_snr"] = "from_file"


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """Samples of one kind of origin, such as videos or renderings.

    ``path``: a folder, or a WebDataset shard (``*.tar``). ``share``: of the samples that a run
    draws; all sources name one, or none does, and then every sample is drawn as often as another.
    ``repeats``: how often one that names no share is gone through while others are once."""

    path: str
    share: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        _bounds("data.sources", self, shares=("share",), least={"repeats": 1})
        if self.share and self.repeats != 1:
            raise ConfigError("data.sources: a share and repeats say the same; give one of them")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Samples; see docs/data.md. ``paths``: folders, or WebDataset shards (``*.tar``), all of whose
    samples are drawn equally often; or ``sources``, which say how often."""

    paths: tuple[str, ...] = ()
    sources: tuple[SourceSettings, ...] = ()
    # Pictures are scaled and cropped around their middle: to a square of this side, or to the
    # nearest of several shapes of about as many pixels ("buckets").
    resolution: int = 1024
    shapes: Literal["square", "buckets"] = "square"
    max_subjects: int = 3  # scene samples keep the largest ones
    workers: int = 4
    # Folder for text states and target latents, and without augmentation for what the references
    # are encoded to as well; "" computes them every time.
    cache: str = ""
    mirror: bool = False  # flip half of the targets, with their masks

    def __post_init__(self) -> None:
        _bounds("data", self, least={"resolution": 8, "max_subjects": 1, "workers": 0})
        if bool(self.paths) == bool(self.sources):
            raise ConfigError("data: give paths, or sources with shares or repeats; one of the two")
        named = [source.share > 0 for source in self.sources]
        if any(named) and not all(named):
            raise ConfigError("data.sources: give every source a share, or none")

    @property
    def origins(self) -> tuple[SourceSettings, ...]:
        """All that is drawn from."""
        return self.sources or tuple(SourceSettings(path=path) for path in self.paths)


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """Changes to the reference picture, against copy-paste: the paper's (3.4), rotation, cropping
    and zero padding; flipping and recolouring when asked for. Probabilities in [0,1]."""

    rotate: float = 0.5
    degrees: float = 30.0
    crop: float = 0.3
    least_kept: float = 0.6  # smallest side that a crop keeps, relative
    pad: float = 0.3
    most_padding: float = 0.3  # largest zero border added, relative to the side
    flip: float = 0.0  # letters and partings have a side
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
    """AdamW; the paper names the learning rate and the batch, the rest is torch's default. Others
    are for cards with less memory, or for comparison (:mod:`.optimisers`).

    ``weights``: "bf16" holds what is trained, its gradients and moments in half the memory; each
    update is then rounded up or down at random, so that small ones are not lost on average."""

    name: OptimiserName = "adamw"
    weights: Weights = "float32"
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
        if self.weights == "bf16" and not self.name.startswith("adamw"):
            raise ConfigError(
                f"optimiser.weights: got 'bf16' with {self.name!r}, expected 'adamw' or "
                "'adamw_8bit', whose updates are rounded at random; set weights to 'float32'"
            )
        if self.name == "prodigy" and self.learning_rate < 0.1:
            raise ConfigError(
                f"optimiser.learning_rate: got {self.learning_rate:g} with 'prodigy', which finds "
                "the rate itself and multiplies it by this; set it to 1"
            )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Changes to Eq. 1, all off in the paper.

    ``min_snr``: gamma of min-SNR weighting (Hang et al. 2023; 5 is usual). ``huber``: c of the
    pseudo-Huber loss instead of the square. ``noise_offset``: deviation of the number that is added
    to all of a channel's noise (0.05 is usual)."""

    min_snr: float = 0.0
    huber: float = 0.0
    noise_offset: float = 0.0

    def __post_init__(self) -> None:
        _bounds("loss", self, least={"min_snr": 0, "huber": 0, "noise_offset": 0})


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
    timesteps: Timesteps = "uniform"
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    checkpointing: bool = True  # recompute activations in the backward pass
    offload_activations: bool = False  # keep what is not recomputed in the machine's memory
    shard: bool = False  # stage 1: each process holds a part of what is trained (FSDP2), not all
    compile: bool = False  # blocks of the networks, by torch.compile
    trackers: tuple[Tracker, ...] = ("tensorboard",)
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
class ValidationSettings:
    """What is measured on samples that training does not see, every so many steps; 0 steps: never.

    Without ``paths``, up to ``samples`` of the run's own, and at most one of 50, are held out for
    it. Each is seen once at each of ``levels`` noise levels, with noise of its own, always the
    same, and nothing of it is changed or dropped."""

    every: int = 500
    paths: tuple[str, ...] = ()
    samples: int = 32
    levels: int = 4

    def __post_init__(self) -> None:
        _bounds("validation", self, least={"every": 0, "samples": 1, "levels": 1})


@dataclass(frozen=True, kw_only=True)
class SubjectSettings:
    """Stage 1: the subject encoder. ``clip`` and ``reference`` switch a branch off (ablations).

    ``scenes``: share of samples that are scenes. Their reference is cut from the target itself,
    which teaches to copy it, pose and light included; the paper trains on pairs alone.

    ``inside``: 0 is Eq. 1; errors inside the subject count 1 + inside times as much. It needs the
    subject's mask in the target (scenes have it, pairs by ``target_mask.png``). Stage 1 routes a
    subject everywhere, so on small subjects the mean over a picture is mostly about keeping out of
    the rest, which is the router's work."""

    clip: bool = True
    reference: bool = True
    scenes: float = 0.0
    inside: float = 0.0
    drop_clip: float = 0.1  # share of samples whose CLIP condition becomes the background's
    drop_text: float = 0.1  # share of samples whose caption becomes empty
    # CLIP tokens' QFormer and K and V maps from this file instead of a new one and the U-Net's own
    ip_adapter: str = ""
    start_file: str = ""  # go on from these AnyStory weights instead of the U-Net's

    def __post_init__(self) -> None:
        _bounds("subject", self, shares=("drop_clip", "drop_text", "scenes"), least={"inside": 0})


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
