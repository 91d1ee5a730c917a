"""Where each of our tensors comes from: names in public files, from the one table of sites.

Three ways of naming occur in public files:

- *ldm*: single-file checkpoints, ``model.diffusion_model.input_blocks.4.1...``; our ReferenceNet
  has the same names.
- *diffusers*: ``down_blocks.1.attentions.0...``, a U-Net folder or one file of it.
- *IP-Adapter*: ``image_proj.*`` and ``ip_adapter.N.to_k_ip.weight``; diffusers, which stores an
  adapter inside its U-Net, says ``encoder_hid_proj.image_projection_layers.0.*`` and
  ``down_blocks...attn2.processor.to_k_ip.0.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .config import UNetConfig
from .sites import UNetSite

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


_LAYER = re.compile(r"layers\.(\d+)\.(0|1)\.(.+)")
_LAYER_MEMBERS = {
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}


def adapter_names(ours: str, site: UNetSite | None) -> tuple[str, ...]:
    """Name in an IP-Adapter file of one of our tensors: of the QFormer (``latents``,
    ``layers.0.0.to_q.weight`` ...), or of a block's ``to_k.weight``."""
    if site is None:
        return (f"image_proj.{ours}",)
    return (f"ip_adapter.{site.ip_adapter}.{_ip(ours, '')}",)


def diffusers_adapter_names(ours: str, site: UNetSite | None) -> tuple[str, ...]:
    """As :func:`adapter_names` in a diffusers U-Net. Two names: their rows follow one another."""
    if site is not None:
        return (f"{site.diffusers}.attn2.processor.{_ip(ours, '.0')}",)
    prefix = "encoder_hid_proj.image_projection_layers.0."
    match = _LAYER.fullmatch(ours)
    if match is None:
        return (prefix + ours,)
    layer, half, rest = match.groups()
    member, _, leaf = f"{half}.{rest}".rpartition(".")
    if member == "0.to_kv":
        return tuple(f"{prefix}layers.{layer}.attn.{m}.{leaf}" for m in ("to_k", "to_v"))
    return (f"{prefix}layers.{layer}.{_LAYER_MEMBERS[member]}.{leaf}",)


def _ip(ours: str, index: str) -> str:
    """``to_k.weight`` -> ``to_k_ip.weight``, with diffusers' adapter number in between."""
    member, leaf = ours.split(".")
    return f"{member}_ip{index}.{leaf}"
