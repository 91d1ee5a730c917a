"""Every number of AnyStory on FLUX.1, in frozen dataclasses that check themselves when built.

A weights file carries its :class:`FluxConfig` as JSON in its header. The defaults are those of the
authors' release for FLUX.1-dev.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from ...config import LARGEST, MOST_LAYERS, bounded, from_dict
from ...errors import ConfigError


def _fractions(owner: object, *names: str) -> None:
    """ConfigError unless each named value lies in [0, 1]."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{type(owner).__name__}.{name}: got {value}, expected 0 to 1")


@dataclass(frozen=True, kw_only=True)
class FluxTransformerConfig:
    """Shape of the FLUX.1 transformer: ``double_blocks`` with two streams, then
    ``single_blocks`` over [text, image]."""

    width: int = 3072
    heads: int = 24
    double_blocks: int = 19
    single_blocks: int = 38
    context_dim: int = 4096  # width of the T5 states
    channels: int = 16  # of the latent
    patch_size: int = 2  # latent pixels per token, along one side
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        bounded(self, LARGEST, "width", "heads", "context_dim", "channels", "patch_size")
        bounded(self, MOST_LAYERS, "double_blocks", "single_blocks", "mlp_ratio")
        if self.width % self.heads:
            raise ConfigError(
                f"FluxTransformerConfig.width: got {self.width}, expected a multiple of heads = "
                f"{self.heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """Width inside the feed-forward layers."""
        return self.width * self.mlp_ratio

    @property
    def token_width(self) -> int:
        """Numbers of the latent in one image token."""
        return self.channels * self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """The vision encoder that the Redux embedders read; the defaults are so400m/14-384.

    Its pictures are normalised by ``(x - mean) / std``, the same for all three channels."""

    width: int = 1152
    layers: int = 27
    image_size: int = 384
    patch_size: int = 14
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        bounded(self, LARGEST, "width", "image_size", "patch_size")
        bounded(self, MOST_LAYERS, "layers")
        if not self.std > 0:
            raise ConfigError(f"SiglipConfig.std: got {self.std}, expected > 0")
        if self.patch_size > self.image_size:
            raise ConfigError(
                f"SiglipConfig.patch_size: got {self.patch_size}, expected at most image_size = "
                f"{self.image_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side (27 for 384 / 14)."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class ReduxConfig:
    """The two Redux embedders: tokens along one side of the pooled grid, rank of the low-rank
    branches on both layers."""

    subject_grid: int = 9
    routing_grid: int = 3
    hidden_ratio: int = 3  # hidden width of the embedder in context widths
    rank: int = 128

    def __post_init__(self) -> None:
        bounded(self, LARGEST, "subject_grid", "routing_grid", "rank")
        bounded(self, MOST_LAYERS, "hidden_ratio")

    @property
    def subject_tokens(self) -> int:
        """Tokens of one picture in the text stream."""
        return self.subject_grid**2

    @property
    def routing_tokens(self) -> int:
        """Tokens of one picture in the router's stream."""
        return self.routing_grid**2


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """Ranks of the low-rank branches beside the transformer's layers, and whether their second
    layer has a bias."""

    reference_rank: int = 128
    reference_bias: bool = True
    router_rank: int = 128
    router_bias: bool = True
    routing_map_rank: int = 128

    def __post_init__(self) -> None:
        bounded(self, LARGEST, "reference_rank", "router_rank", "routing_map_rank")


@dataclass(frozen=True, kw_only=True)
class FluxReferenceConfig:
    """What the reference stream sees: pictures of ``size`` squared as latents at model scale.

    A VAE's unscaled latent ``z`` enters as ``(z - latent_shift) * latent_scale``."""

    size: int = 512
    latent_scale: float = 0.3611
    latent_shift: float = 0.1159
    latent_stride: int = 8

    def __post_init__(self) -> None:
        bounded(self, LARGEST, "size", "latent_stride")
        if not self.latent_scale > 0:
            raise ConfigError(
                f"FluxReferenceConfig.latent_scale: got {self.latent_scale}, expected > 0"
            )
        if self.size % self.latent_stride:
            raise ConfigError(
                f"FluxReferenceConfig.size: got {self.size}, expected a multiple of "
                f"latent_stride = {self.latent_stride}"
            )


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """When and how strongly the branches act, as in the authors' demos; fractions of the sampling.

    Redux tokens enter times ``concept_scale``. References begin at ``reference_start``, with two
    subjects and more at ``reference_start_several``."""

    concept_scale: float = 0.6
    concept_start: float = 0.1
    concept_end: float = 0.3
    reference_start: float = 0.0
    reference_start_several: float = 0.09
    reference_end: float = 1.0

    def __post_init__(self) -> None:
        _fractions(self, "concept_start", "concept_end", "reference_start", "reference_end")
        _fractions(self, "reference_start_several")
        if not self.concept_scale >= 0:
            raise ConfigError(
                f"WindowConfig.concept_scale: got {self.concept_scale}, expected 0 or more"
            )

    def start(self, subjects: int) -> float:
        """Where the references begin with so many subjects."""
        return self.reference_start if subjects < 2 else self.reference_start_several


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """All sizes of one AnyStory model for FLUX.1. ``family`` tells its files from SDXL's."""

    family: Literal["flux"] = "flux"
    name: str = "flux"
    transformer: FluxTransformerConfig = FluxTransformerConfig()
    vision: SiglipConfig = SiglipConfig()
    redux: ReduxConfig = ReduxConfig()
    branches: BranchConfig = BranchConfig()
    reference: FluxReferenceConfig = FluxReferenceConfig()
    windows: WindowConfig = WindowConfig()

    def __post_init__(self) -> None:
        stride = self.reference.latent_stride * self.transformer.patch_size
        if self.reference.size % stride:
            raise ConfigError(
                f"FluxConfig.reference.size: got {self.reference.size}, expected a multiple of "
                f"{stride}, the pixels of one token"
            )

    @property
    def reference_grid(self) -> int:
        """Tokens along one side of a reference (32 for 512)."""
        return self.reference.size // self.reference.latent_stride // self.transformer.patch_size

    def to_json(self) -> str:
        """One line of JSON that :meth:`from_json` reads back to an equal object."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> FluxConfig:
        """Read :meth:`to_json`; unknown keys, missing keys and wrong types are a ConfigError."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"anystory.config is not JSON: {error}") from error
        return from_dict(cls, data, "anystory.config", complete=True)
