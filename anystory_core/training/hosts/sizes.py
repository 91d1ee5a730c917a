"""The sizes of a base as diffusers states them."""

from __future__ import annotations

from typing import Any

from ...bases.sdxl.config import UNetConfig


def diffusers_unet_config(unet: UNetConfig) -> dict[str, Any]:
    """Arguments of ``UNet2DConditionModel`` for these sizes."""
    widths = tuple(unet.model_channels * m for m in unet.channel_mult)
    levels = len(widths)
    attends = [bool(d) for d in unet.transformer_depth]
    return {
        "in_channels": unet.in_channels,
        "out_channels": unet.in_channels,
        "block_out_channels": widths,
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)
        ),
        "transformer_layers_per_block": tuple(max(1, d) for d in unet.transformer_depth),
        "attention_head_dim": tuple(w // unet.head_dim for w in widths),  # diffusers: head count
        "cross_attention_dim": unet.context_dim,
        "norm_num_groups": unet.norm_groups,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": unet.adm_channels,
        "sample_size": 128 if levels == 3 and unet.model_channels == 320 else 32,
    }
