"""Sizes of an SDXL-like base and of the AnyStory modules around it.

A weights file carries its :class:`AnyStoryConfig` as JSON in its header, so no widget can
contradict it. Two configurations ship: :meth:`AnyStoryConfig.sdxl` (the paper's) and
:meth:`AnyStoryConfig.mini` (the same topology at small widths).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from ...config import (
    LARGEST,
    MOST_LAYERS,
    ClipBranchConfig,
    ClipVisionConfig,
    QFormerConfig,
    References,
    RouterConfig,
    bounded,
    from_dict,
    later,
    to_dict,
)
from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of an SDXL-like denoising U-Net; the defaults are SDXL's."""

    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    transformer_depth: tuple[int, ...] = (0, 2, 10)  # transformer blocks per layer, for each level
    middle_depth: int = 10
    head_dim: int = 64
    context_dim: int = 2048  # width of the text states
    adm_channels: int = 2816  # width of the label embedding: pooled text + 6 x 256
    in_channels: int = 4
    norm_groups: int = 32

    def __post_init__(self) -> None:
        sizes = ("model_channels", "head_dim", "context_dim", "adm_channels", "in_channels")
        bounded(self, LARGEST, *sizes, "norm_groups")
        bounded(self, MOST_LAYERS, "num_res_blocks", "middle_depth", "channel_mult")
        bounded(self, MOST_LAYERS, "transformer_depth", least=0)
        if not 1 <= len(self.channel_mult) <= 8:
            raise ConfigError(f"UNetConfig.channel_mult: got {self.channel_mult}, expected 1 to 8")
        if len(self.channel_mult) != len(self.transformer_depth):
            raise ConfigError(
                f"UNetConfig: got {len(self.channel_mult)} levels in channel_mult and "
                f"{len(self.transformer_depth)} in transformer_depth, expected as many"
            )
        for level, mult in enumerate(self.channel_mult):
            width = self.model_channels * mult
            if width % self.norm_groups:
                raise ConfigError(
                    f"UNetConfig: level {level} has {width} channels, expected a multiple of "
                    f"norm_groups = {self.norm_groups}"
                )
            if self.transformer_depth[level] and width % self.head_dim:
                raise ConfigError(
                    f"UNetConfig: level {level} has {width} channels, expected a multiple of "
                    f"head_dim = {self.head_dim}"
                )

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text state, what the label embedding has beside six sizes."""
        return self.adm_channels - 6 * 256

    @property
    def time_channels(self) -> int:
        """Width of the time embedding."""
        return 4 * self.model_channels


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What the ReferenceNet sees: pictures of ``size`` squared as latents at U-Net scale.

    A VAE's unscaled latent ``z`` enters as ``(z - latent_shift) * latent_scale``.
    ``cross_attention`` keeps the text blocks (Table 1, "original ReferenceNet").
    """

    size: int = 512
    latent_scale: float = 0.13025
    latent_shift: float = 0.0
    latent_stride: int = 8
    cross_attention: bool = False

    def __post_init__(self) -> None:
        bounded(self, LARGEST, "size", "latent_stride")
        if not self.latent_scale > 0:
            raise ConfigError(
                f"ReferenceConfig.latent_scale: got {self.latent_scale}, expected > 0"
            )
        if self.size % self.latent_stride:
            raise ConfigError(
                f"ReferenceConfig.size: got {self.size}, expected a multiple of "
                f"latent_stride = {self.latent_stride}"
            )


@dataclass(frozen=True, kw_only=True)
class AnyStoryConfig:
    """All sizes of one AnyStory model."""

    name: str = "sdxl"
    unet: UNetConfig = UNetConfig()
    clip: ClipVisionConfig = ClipVisionConfig()
    subject_qformer: QFormerConfig = QFormerConfig()
    routing_qformer: QFormerConfig = QFormerConfig(queries=1, output_dim=1280)
    reference: ReferenceConfig = ReferenceConfig()
    router: RouterConfig = RouterConfig()
    clip_branch: ClipBranchConfig = later(ClipBranchConfig())
    references: References = later("whole")

    def __post_init__(self) -> None:
        if self.subject_qformer.output_dim != self.unet.context_dim:
            raise ConfigError(
                f"subject_qformer.output_dim: got {self.subject_qformer.output_dim}, expected the "
                f"U-Net's context_dim = {self.unet.context_dim}"
            )
        if self.routing_qformer.queries != 1:
            raise ConfigError(
                f"routing_qformer.queries: got {self.routing_qformer.queries}, expected 1"
            )

    @property
    def routing_dim(self) -> int:
        """Width ``d_r`` of a routing feature."""
        return self.routing_qformer.output_dim

    @classmethod
    def sdxl(cls) -> AnyStoryConfig:
        """The paper's sizes on SDXL and CLIP ViT-H/14."""
        return cls()

    @classmethod
    def mini(cls) -> AnyStoryConfig:
        """The same topology, small: the model that ships with the pack (16 blocks).

        SDXL's deeper level has more blocks, this one's fewer: its 8x8 tokens are too few for
        routes, and a mean over maps is no better than most of them are."""
        return cls(
            name="mini",
            unet=UNetConfig(
                model_channels=64,
                channel_mult=(1, 1, 2),
                transformer_depth=(0, 2, 1),
                middle_depth=1,
                head_dim=32,
                context_dim=256,
                adm_channels=256 + 1536,
            ),
            clip=ClipVisionConfig(
                width=192, layers=6, heads=6, intermediate=768, projection_dim=256
            ),
            subject_qformer=QFormerConfig(
                queries=16, width=192, layers=2, heads=6, head_dim=32, output_dim=256
            ),
            routing_qformer=QFormerConfig(
                queries=1, width=192, layers=2, heads=6, head_dim=32, output_dim=192
            ),
            reference=ReferenceConfig(size=192, latent_scale=1.0),
            router=RouterConfig(key_dim=64, heads=4),
        )

    def to_json(self) -> str:
        """One line of JSON that :meth:`from_json` reads back to an equal object."""
        return json.dumps(to_dict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> AnyStoryConfig:
        """Read :meth:`to_json`; unknown keys, missing keys and wrong types are a ConfigError."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"anystory.config is not JSON: {error}") from error
        return from_dict(cls, data, "anystory.config", complete=True)
