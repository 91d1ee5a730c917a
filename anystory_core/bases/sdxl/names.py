"""Names of the U-Net's tensors: the one table between the two ways in which public files have them.

- *ldm*: the host's, and those of single-file checkpoints behind ``model.diffusion_model.``:
  ``input_blocks.4.1...``; our ReferenceNet has the same names.
- *diffusers*: ``down_blocks.1.attentions.0...``, a U-Net folder or one file of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .config import AnyStoryConfig, UNetConfig
from .reference_net import ReferenceNet

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
LDM_PREFIX = "model.diffusion_model."


def diffusers_modules(unet: UNetConfig) -> dict[str, str]:
    """Module paths of a U-Net, ldm -> diffusers: embeddings, convolutions, resnet blocks'
    members, transformers (whose members have the same names in both), resamplers."""
    table = dict(_OUTSIDE)
    levels = len(unet.channel_mult)

    def resnet(ldm: str, diffusers: str) -> None:
        table.update({f"{ldm}.{ours}": f"{diffusers}.{its}" for ours, its in _RESNET.items()})

    number = 1
    for level in range(levels):
        for layer in range(unet.num_res_blocks):
            resnet(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}")
            table[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{layer}"
            number += 1
        table[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        number += 1

    resnet("middle_block.0", "mid_block.resnets.0")
    table["middle_block.1"] = "mid_block.attentions.0"
    resnet("middle_block.2", "mid_block.resnets.1")

    number = 0
    for step, level in enumerate(reversed(range(levels))):
        for layer in range(unet.num_res_blocks + 1):
            resnet(f"output_blocks.{number}.0", f"up_blocks.{step}.resnets.{layer}")
            table[f"output_blocks.{number}.1"] = f"up_blocks.{step}.attentions.{layer}"
            if level and layer == unet.num_res_blocks:
                member = 2 if unet.transformer_depth[level] else 1
                upsampler = f"up_blocks.{step}.upsamplers.0.conv"
                table[f"output_blocks.{number}.{member}.conv"] = upsampler
            number += 1
    return table


def diffusers_name(modules: Mapping[str, str], ldm: str) -> str:
    """The diffusers name of an ldm tensor, by :func:`diffusers_modules`. KeyError: unknown."""
    parts = ldm.split(".")
    for length in range(len(parts) - 1, 0, -1):  # the longest module path wins
        path = ".".join(parts[:length])
        if path in modules:
            return ".".join((modules[path], *parts[length:]))
    raise KeyError(ldm)


def ldm_to_diffusers(config: AnyStoryConfig) -> dict[str, str]:
    """ldm name -> diffusers name of every tensor of the U-Net."""
    reference = dataclasses.replace(config.reference, cross_attention=True)
    whole = ReferenceNet(dataclasses.replace(config, reference=reference), full=True, device="meta")
    modules = diffusers_modules(config.unet)
    return {name: diffusers_name(modules, name) for name in whole.state_dict()}
