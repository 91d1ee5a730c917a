"""The host's own Flux at tiny widths, and our patches around one call of it."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import torch
from flux_net import AXES, POOLED, THETA, shake
from flux_scene import CONFIG
from torch import Tensor


def tiny_flux(seed: int = 1, dtype: torch.dtype = torch.float32, operations: Any = None) -> Any:
    """``comfy.ldm.flux.model.Flux`` of the tiny sizes with random weights."""
    import comfy.ops
    from comfy.ldm.flux import model

    sizes = CONFIG.transformer
    newer: dict[str, Any] = {}
    if "txt_ids_dims" in inspect.signature(model.FluxParams).parameters:
        newer["txt_ids_dims"] = []
    net = model.Flux(
        image_model="flux",
        in_channels=sizes.channels,
        out_channels=sizes.channels,
        patch_size=sizes.patch_size,
        vec_in_dim=POOLED,
        context_in_dim=sizes.context_dim,
        hidden_size=sizes.width,
        mlp_ratio=float(sizes.mlp_ratio),
        num_heads=sizes.heads,
        depth=sizes.double_blocks,
        depth_single_blocks=sizes.single_blocks,
        axes_dim=list(AXES),
        theta=THETA,
        qkv_bias=True,
        guidance_embed=True,
        dtype=dtype,
        device="cpu",
        operations=operations or comfy.ops.manual_cast,
        **newer,
    )
    shake(net, torch.Generator().manual_seed(seed))
    return net.eval().requires_grad_(False)


def patches(pack: ModuleType) -> Any:
    """Our glue for FLUX."""
    return sys.modules[f"{pack.__name__}.host.flux.patches"]


def run(
    pack: ModuleType, net: Any, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor,
    guidance: Tensor, call: Any, options: dict[str, Any] | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """One call of the host's Flux with our patches: x (B,C,h,w), context already extended."""
    glue = patches(pack)
    options = {"patches": {}, **(options or {})}
    call.attention = glue.HeadAttention({**options}, options.get(glue.OVERRIDE))
    call.aside = glue.HeadAttention({**options})
    call.enter(net, context)
    options = glue.installed(options, glue.BlockTable(call.sites), net, call)
    return net(x, t, context, pooled, guidance, transformer_options=options, **kwargs)
