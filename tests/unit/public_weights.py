"""Small random weights in the public layouts, for tests of the conversion."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig, ReferenceConfig, UNetConfig
from anystory_core.bases.sdxl.reference_net import ReferenceNet
from anystory_core.config import ClipVisionConfig, QFormerConfig
from anystory_core.weights.convert.conversion import convert


def small_config(depths: tuple[int, int, int] = (0, 1, 2), middle: int = 2) -> AnyStoryConfig:
    """SDXL's topology at widths 32, 64 and 128."""
    return AnyStoryConfig(
        name="small",
        unet=UNetConfig(
            model_channels=32,
            transformer_depth=depths,
            middle_depth=middle,
            head_dim=32,
            context_dim=48,
            adm_channels=16 + 6 * 8,
        ),
        clip=ClipVisionConfig(width=40, layers=2, heads=2, intermediate=80),
        subject_qformer=QFormerConfig(
            queries=64, width=64, layers=1, heads=1, head_dim=64, output_dim=48
        ),
        reference=ReferenceConfig(size=64),
    )


def diffusers_unet(config: AnyStoryConfig, seed: int = 0) -> UNet2DConditionModel:
    """A random U-Net of these sizes, float32."""
    torch.manual_seed(seed)
    unet = config.unet
    widths = tuple(unet.model_channels * m for m in unet.channel_mult)
    return UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, unet.transformer_depth[1], unet.middle_depth),
        attention_head_dim=tuple(w // unet.head_dim for w in widths),  # diffusers: number of heads
        cross_attention_dim=unet.context_dim,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=unet.adm_channels,
    ).eval()


def adapter_state(
    names: list[str], config: AnyStoryConfig, *, queries: int = 16, layers: int = 4, seed: int = 1
) -> dict[str, Tensor]:
    """IP-Adapter Plus in the public layout for the attention layers ``names`` of a diffusers
    U-Net, in its own order: the n-th layer is number n, and only cross-attention has weights."""
    make = torch.Generator().manual_seed(seed)
    width, inner, text = 64, 128, config.unet.context_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make) / shape[-1] ** 0.5

    state = {
        "image_proj.latents": random(1, queries, width),
        "image_proj.proj_in.weight": random(width, config.clip.width),
        "image_proj.proj_in.bias": random(width),
        "image_proj.proj_out.weight": random(text, width),
        "image_proj.proj_out.bias": random(text),
        "image_proj.norm_out.weight": 1 + random(text),
        "image_proj.norm_out.bias": random(text),
    }
    for i in range(layers):
        layer = f"image_proj.layers.{i}"
        for norm in ("0.norm1", "0.norm2", "1.0"):
            state[f"{layer}.{norm}.weight"] = 1 + random(width)
            state[f"{layer}.{norm}.bias"] = random(width)
        state[f"{layer}.0.to_q.weight"] = random(inner, width)
        state[f"{layer}.0.to_kv.weight"] = random(2 * inner, width)
        state[f"{layer}.0.to_out.weight"] = random(width, inner)
        state[f"{layer}.1.1.weight"] = random(4 * width, width)
        state[f"{layer}.1.3.weight"] = random(width, 4 * width)
    levels = config.unet.channel_mult
    for number, name in enumerate(names):
        if "attn2" not in name:
            continue
        if name.startswith("mid_block"):
            mult = levels[-1]
        else:
            place = int(name.split(".")[1])
            mult = (levels if name.startswith("down") else levels[::-1])[place]
        for member in ("to_k_ip", "to_v_ip"):
            key = f"ip_adapter.{number}.{member}.weight"
            state[key] = random(config.unet.model_channels * mult, text)
    return state


def with_gates(adapter: Mapping[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    """An IP-Adapter Plus as MIP-Adapter: with a gate at every block."""
    make = torch.Generator().manual_seed(seed)
    state = dict(adapter)
    for name, tensor in adapter.items():
        if name.endswith("to_k_ip.weight"):
            width = tensor.shape[0]
            gate = torch.randn(1, width, generator=make) * 2  # large enough to be no 1
            state[name.replace("to_k_ip", "text_to_weight")] = gate
    return state


def ms_diffusion_state(
    names: list[str], config: AnyStoryConfig, *, phrase: int = 6, seed: int = 4
) -> dict[str, Tensor]:
    """MS-Diffusion in its public layout, for the attention layers ``names``."""
    plus = adapter_state(names, config, layers=2, seed=seed)
    make = torch.Generator().manual_seed(seed + 1)
    queries, width = plus.pop("image_proj.latents").shape[1:]
    inputs = phrase + 64  # 8 frequencies, sine and cosine, 4 numbers of a box

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make) / shape[-1] ** 0.5

    state = {name.replace("ip_adapter.", "ms_adapter."): x for name, x in plus.items()}
    state |= {
        "image_proj.grounding_latents": random(1, queries, width),
        "image_proj.latent_proj.0.weight": random(2 * inputs, inputs),
        "image_proj.latent_proj.0.bias": random(2 * inputs),
        "image_proj.latent_proj.2.weight": random(queries * width, 2 * inputs),
        "image_proj.latent_proj.2.bias": random(queries * width),
        "dummy_image_tokens": random(1, 4, config.unet.context_dim),
    }
    for norm in ("latent_norm", "attention_norm"):
        state[f"image_proj.{norm}.weight"] = 1 + random(width)
        state[f"image_proj.{norm}.bias"] = random(width)
    return state


def save_pickle(path: Path, state: Mapping[str, Tensor]) -> Path:
    """The same tensors by ``torch.save``, each group of names as a table of its own."""
    groups: dict[str, Any] = {}
    for name, tensor in state.items():
        group, _, rest = name.partition(".")
        if rest:
            groups.setdefault(group, OrderedDict())[rest] = tensor
        else:
            groups[group] = torch.nn.Parameter(tensor)
    torch.save(groups, path)
    return path


def ldm_state(config: AnyStoryConfig, *, channels: int = 4, seed: int = 2) -> dict[str, Tensor]:
    """A single-file checkpoint's U-Net, cross-attention included, with text-encoder extras."""
    torch.manual_seed(seed)
    reference = dataclasses.replace(config.reference, cross_attention=True)
    net = ReferenceNet(dataclasses.replace(config, reference=reference), full=True)
    state = {f"model.diffusion_model.{k}": v for k, v in net.state_dict().items()}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    state[first] = torch.randn(config.unet.model_channels, channels, 3, 3)
    state["first_stage_model.decoder.conv_in.weight"] = torch.randn(4, 4, 3, 3)
    return state


def save(path: Path, state: Mapping[str, Tensor], **metadata: Any) -> Path:
    """Write a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous() for k, v in state.items()}, path, metadata or None)
    return path


def run(tmp_path: Path, unet: dict[str, Tensor], adapter: dict[str, Tensor], **options):
    """Convert from freshly written files; returns the result and the loaded tensors."""
    checkpoint = save(tmp_path / "base.safetensors", unet)
    ip = save(tmp_path / "plus.safetensors", adapter)
    options = {"config": small_config(), "dtype": torch.float32, **options}
    done = convert(checkpoint, ip, tmp_path / "out" / "a.safetensors", **options)
    return done, load_file(done.path)
