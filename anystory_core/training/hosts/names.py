"""Parameter names of a U-Net: ldm (ComfyUI, our ReferenceNet, SDXL files) <-> diffusers.

The table is not typed here: diffusers' own single-file converter is asked where each name goes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor

from ...bases.sdxl.config import AnyStoryConfig, UNetConfig
from ...bases.sdxl.reference_net import ReferenceNet
from ...weights.model import AnyStoryModel


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


def ldm_to_diffusers(config: AnyStoryConfig) -> dict[str, str]:
    """ldm name -> diffusers name for every tensor of the U-Net."""
    from diffusers.loaders import single_file_utils

    reference = dataclasses.replace(config.reference, cross_attention=True)
    whole = ReferenceNet(dataclasses.replace(config, reference=reference), full=True, device="meta")
    prefix = "model.diffusion_model."
    names: dict[str, Any] = {prefix + name: name for name in whole.state_dict()}
    convert = cast(Any, single_file_utils).convert_ldm_unet_checkpoint
    table = cast(dict[str, str], convert(names, diffusers_unet_config(config.unet)))
    return {ldm: diffusers for diffusers, ldm in table.items()}


def init_from_unet(model: AnyStoryModel, unet: dict[str, Tensor]) -> None:
    """Start the trained parts from the U-Net's weights (diffusers names), as in the paper.

    ReferenceNet: key by key, mask channel zero. K and V for references: the block's own attn1 maps.
    K and V for CLIP tokens: its attn2 maps."""
    with torch.no_grad():
        if model.reference_net is not None:
            table = ldm_to_diffusers(model.config)
            for name, target in model.reference_net.state_dict().items():
                source = unet[table[name]]
                if target.shape != source.shape:  # the first convolution: one more input channel
                    target.zero_()
                    target[:, : source.shape[1]].copy_(source)
                else:
                    target.copy_(source)
        for site in model.sites:
            if model.projections.clip is not None:
                _copy(model.projections.clip.at(site.index), unet, f"{site.diffusers}.attn2")
            if model.projections.reference is not None and site.index > 1:
                _copy(model.projections.reference.at(site.index), unet, f"{site.diffusers}.attn1")


def _copy(projection: Any, unet: dict[str, Tensor], path: str) -> None:
    projection.to_k.weight.copy_(unet[f"{path}.to_k.weight"])
    projection.to_v.weight.copy_(unet[f"{path}.to_v.weight"])
