"""The tensors of an SDXL single file, by the names that Stability's files have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.names import ldm_to_diffusers


def file_tensors(
    config: AnyStoryConfig, unet: Any, vae: Any, small: Any, large: Any
) -> dict[str, Tensor]:
    """diffusers' and transformers' modules as one file's tensors."""
    found = unet.state_dict()
    out = {
        f"model.diffusion_model.{old}": found[new] for old, new in ldm_to_diffusers(config).items()
    }
    out |= _vae(vae)
    prefix = "conditioner.embedders.0.transformer.text_model."
    for name, tensor in getattr(small, "text_model", small).state_dict().items():
        out[prefix + name] = tensor
    out[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    return out | _open_clip(large)


def _open_clip(model: Any) -> dict[str, Tensor]:
    s, out, p = model.state_dict(), {}, "conditioner.embedders.1.model."
    text = "text_model."
    out[f"{p}token_embedding.weight"] = s[f"{text}embeddings.token_embedding.weight"]
    out[f"{p}positional_embedding"] = s[f"{text}embeddings.position_embedding.weight"]
    out[f"{p}text_projection"] = s["text_projection.weight"].T.contiguous()
    out[f"{p}logit_scale"] = torch.tensor(4.6)
    for kind in ("weight", "bias"):
        out[f"{p}ln_final.{kind}"] = s[f"{text}final_layer_norm.{kind}"]
        for i in range(model.config.num_hidden_layers):
            old, new = f"{text}encoder.layers.{i}.", f"{p}transformer.resblocks.{i}."
            parts = [s[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[f"{new}attn.in_proj_{kind}"] = torch.cat(parts)
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                out[f"{new}{b}.{kind}"] = s[f"{old}{a}.{kind}"]
    return out


def _vae(vae: Any) -> dict[str, Tensor]:
    """Decoder levels are numbered from the picture's size down, and 1x1 convolutions make the
    attention's maps."""
    levels = len(vae.config.block_out_channels)
    out: dict[str, Tensor] = {}
    for name, tensor in vae.state_dict().items():
        words = name.split(".")
        side = words[0]
        if words[1] in ("down_blocks", "up_blocks"):
            level = int(words[2])
            up = words[1] == "up_blocks"
            path = f"up.{levels - 1 - level}" if up else f"down.{level}"
            if words[3] == "resnets":
                rest = ".".join(words[5:]).replace("conv_shortcut", "nin_shortcut")
                new = f"{side}.{path}.block.{words[4]}.{rest}"
            else:
                new = f"{side}.{path}.{'upsample' if up else 'downsample'}.conv.{words[-1]}"
        elif words[1] == "mid_block" and words[2] == "resnets":
            new = f"{side}.mid.block_{int(words[3]) + 1}.{'.'.join(words[4:])}"
        elif words[1] == "mid_block":
            maps = {
                "group_norm": "norm",
                "to_q": "q",
                "to_k": "k",
                "to_v": "v",
                "to_out": "proj_out",
            }
            new = f"{side}.mid.attn_1.{maps[words[4]]}.{words[-1]}"
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        else:
            new = name.replace("conv_norm_out", "norm_out")
        out[f"first_stage_model.{new}"] = tensor
    return out
