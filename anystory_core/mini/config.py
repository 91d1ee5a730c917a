"""Sizes of the mini model's other parts; its U-Net, CLIP vision encoder and AnyStory parts are in
:meth:`anystory_core.config.AnyStoryConfig.mini`.

The text encoder is a CLIP text transformer on CLIP's own tokenizer; the VAE has TAESD's layout; the
latent format has scale 1.
"""

from __future__ import annotations

from typing import Any

from ..bases.sdxl.config import AnyStoryConfig, UNetConfig

CONFIG = AnyStoryConfig.mini()

TEXT: dict[str, Any] = {
    "hidden_size": CONFIG.unet.context_dim,
    "intermediate_size": 4 * CONFIG.unet.context_dim,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
    "pad_token_id": 49407,
    "projection_dim": CONFIG.unet.context_dim,
}

VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": CONFIG.clip.width,
    "intermediate_size": CONFIG.clip.intermediate,
    "num_attention_heads": CONFIG.clip.heads,
    "num_hidden_layers": CONFIG.clip.layers,
    "projection_dim": CONFIG.clip.projection_dim,
    "hidden_act": CONFIG.clip.activation,
    "image_size": CONFIG.clip.image_size,
    "patch_size": CONFIG.clip.patch_size,
    "num_channels": 3,
    "layer_norm_eps": 1e-5,
}

# Latent -> RGB in [-1,1], for previews while sampling: least squares (vae.rgb_factors) on scenes.
LATENT_RGB_FACTORS = (
    (0.1930, 0.2397, -0.0652),
    (-0.1969, 0.1075, 0.1881),
    (0.4124, 0.2316, 0.1516),
    (0.2223, 0.3648, 0.4820),
)
LATENT_RGB_BIAS = (0.0739, 0.1169, 0.1405)

# At 128 a training sample costs 3.5 times less, but the deepest level's blocks then see 4x4 tokens,
# where a subject of three is one token or none: no router could place it. At 256 the routes have an
# IoU of 0.65 with the true masks, at 320 0.70, at 1.4 times the cost (docs/mini.md).
PICTURE_SIZE = 320


def unet_arguments(unet: UNetConfig = CONFIG.unet) -> dict[str, Any]:
    """Keyword arguments of the ``UNetModel`` that SDXL checkpoints are loaded into."""
    levels = zip(unet.channel_mult, unet.transformer_depth, strict=True)
    depth = [d for _, d in levels for _ in range(unet.num_res_blocks)]
    up = [d for d in reversed(unet.transformer_depth) for _ in range(unet.num_res_blocks + 1)]
    return {
        "image_size": PICTURE_SIZE // 8,
        "in_channels": unet.in_channels,
        "out_channels": unet.in_channels,
        "model_channels": unet.model_channels,
        "channel_mult": list(unet.channel_mult),
        "num_res_blocks": [unet.num_res_blocks] * len(unet.channel_mult),
        "transformer_depth": depth,
        "transformer_depth_output": list(reversed(up)),  # popped from its end, deepest level first
        "transformer_depth_middle": unet.middle_depth,
        "num_heads": -1,
        "num_head_channels": unet.head_dim,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "context_dim": unet.context_dim,
        "num_classes": "sequential",
        "adm_in_channels": unet.adm_channels,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "legacy": False,
        "use_checkpoint": False,
    }
