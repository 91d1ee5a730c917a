"""A tiny FLUX with everything around it, through the host's own classes: what its loaders would
give for files of these sizes."""

from __future__ import annotations

import importlib
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from flux_net import AXES, POOLED, THETA, shake
from flux_scene import CONFIG


def unet_config() -> dict[str, Any]:
    """What the host's own detection would say of the tiny FLUX."""
    from comfy.ldm.flux import model

    sizes = CONFIG.transformer
    config: dict[str, Any] = {
        "image_model": "flux",
        "in_channels": sizes.channels,
        "out_channels": sizes.channels,
        "patch_size": sizes.patch_size,
        "vec_in_dim": POOLED,
        "context_in_dim": sizes.context_dim,
        "hidden_size": sizes.width,
        "mlp_ratio": float(sizes.mlp_ratio),
        "num_heads": sizes.heads,
        "depth": sizes.double_blocks,
        "depth_single_blocks": sizes.single_blocks,
        "axes_dim": list(AXES),
        "theta": THETA,
        "qkv_bias": True,
        "guidance_embed": True,
    }
    if "txt_ids_dims" in inspect.signature(model.FluxParams).parameters:
        config["txt_ids_dims"] = []
    return config


def flux_patcher(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A ModelPatcher of a tiny FLUX, as the host's loader makes it."""
    import comfy.latent_formats
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models

    class Format(comfy.latent_formats.Flux):
        latent_channels = CONFIG.transformer.channels

    class Tiny(comfy.supported_models.Flux):
        latent_format = Format

    config = Tiny({**unet_config(), **changes})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    shake(model.diffusion_model, torch.Generator().manual_seed(1))
    model.diffusion_model.eval().requires_grad_(False)
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def other_patcher(kind: str) -> Any:
    """A ModelPatcher of a model of FLUX's kin, "Flux2" or "Chroma", at the tiny sizes."""
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.chroma import model as chroma

    changes: dict[str, Any] = {
        "Flux2": {"image_model": "flux2", "global_modulation": True},
        "Chroma": {
            "image_model": "chroma",
            "in_dim": 16,
            "out_dim": CONFIG.transformer.width,
            "hidden_dim": 16,
            "n_layers": 1,
        },
    }[kind]
    sizes = unet_config()
    if kind == "Chroma":  # it has no guidance, and counts channels in tokens
        known = inspect.signature(chroma.ChromaParams).parameters
        sizes = {name: x for name, x in sizes.items() if name in known}
        sizes["in_channels"] = CONFIG.transformer.token_width
    config = getattr(comfy.supported_models, kind)({**sizes, **changes})
    config.set_inference_dtype(torch.float32, None)
    return comfy.model_patcher.ModelPatcher(
        config.get_model({}, ""), mm.get_torch_device(), mm.unet_offload_device()
    )


def siglip(**changes: Any) -> Any:
    """The host's vision model of the tiny sizes with random weights."""
    from comfy.clip_vision import ClipVisionModel

    vision = CONFIG.vision
    config = {
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vision.width,
        "image_size": vision.image_size,
        "intermediate_size": 2 * vision.width,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": vision.layers,
        "patch_size": vision.patch_size,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        **changes,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "siglip.json"
        path.write_text(json.dumps(config))
        encoder = ClipVisionModel(str(path))
    shake(encoder.model, torch.Generator().manual_seed(3))
    return encoder


def clip() -> Any:
    """The host's CLIP object for FLUX, T5 and CLIP-L of the tiny sizes with random weights."""
    import comfy.sd
    import comfy.supported_models_base
    from comfy.text_encoders import flux

    target = comfy.supported_models_base.ClipTarget(flux.FluxTokenizer, flux.FluxClipModel)
    width = CONFIG.transformer.context_dim
    sizes = {
        "clip_l_model_config": {
            "hidden_size": POOLED,
            "intermediate_size": 2 * POOLED,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "projection_dim": POOLED,
        },
        "t5xxl_model_config": {
            "d_model": width,
            "d_ff": 2 * width,
            "d_kv": 8,
            "num_heads": 2,
            "num_layers": 2,
        },
        "dtype": torch.float32,
    }
    encoder = comfy.sd.CLIP(target, model_options=sizes)
    for part in (encoder.cond_stage_model.clip_l, encoder.cond_stage_model.t5xxl):
        shake(part.transformer, torch.Generator().manual_seed(4))
    return encoder


def anystory(nodes: str) -> Any:
    """Random weights of the tiny sizes, loaded as the pack whose nodes are the package ``nodes``
    loads a file."""
    core = f"{nodes.rpartition('.')[0]}.anystory_core"
    managed = importlib.import_module(f"{nodes}.host.managed")
    weights = importlib.import_module(f"{core}.bases.flux.model")
    config = importlib.import_module(f"{core}.bases.flux.config").FluxConfig
    model = weights.build_model(config.from_json(CONFIG.to_json()), operations=managed.OPERATIONS)
    for _, module in model.modules():
        shake(module, torch.Generator().manual_seed(0))
        module.requires_grad_(False)
    model.fingerprint = "tiny flux"
    return managed.ManagedAnyStory(model, "tiny")
