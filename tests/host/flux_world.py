"""A tiny FLUX in this process with everything around it: weights, vision encoder, subjects."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from flux_net import AXES, POOLED, THETA, shake
from flux_scene import CONFIG
from scene import halves, picture
from torch import Tensor

TEXT = 7


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


def siglip(folder: Path, **changes: Any) -> Any:
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
    path = folder / "siglip.json"
    path.write_text(json.dumps(config))
    encoder = ClipVisionModel(str(path))
    shake(encoder.model, torch.Generator().manual_seed(3))
    return encoder


class FluxWorld:
    """Models, two encoded subjects, and short ways to route, apply and sample."""

    def __init__(
        self, comfy: ModuleType, pack: ModuleType, mini: SimpleNamespace, folder: Path
    ) -> None:
        torch.set_num_threads(1)
        self.comfy, self.pack, self.mini = comfy, pack, mini
        self.core = f"{pack.__name__.rpartition('.')[0]}.anystory_core"
        self.errors = self.module("errors")
        managed = importlib.import_module(f"{pack.__name__}.host.managed")
        weights = self.module("bases.flux.model")
        config = self.module("bases.flux.config").FluxConfig.from_json(CONFIG.to_json())
        model = weights.build_model(config, operations=managed.OPERATIONS)
        for _, module in model.modules():
            shake(module, torch.Generator().manual_seed(0))
            module.requires_grad_(False)
        model.fingerprint = "tiny flux"
        self.anystory = managed.ManagedAnyStory(model, "tiny")
        self.model = flux_patcher()
        self.clip_vision, self.vae = siglip(folder), mini.vae
        self.subjects = [self.encode(i, label=name) for i, name in enumerate(("ball", "box"))]
        self.positive = self.prompt(1)

    def module(self, name: str) -> Any:
        """A module of the core as the pack imports it."""
        return importlib.import_module(f"{self.core}.{name}")

    def encode(self, number: int, **inputs: Any) -> Any:
        image, mask = picture(number)
        given = {
            "anystory": self.anystory,
            "clip_vision": self.clip_vision,
            "vae": self.vae,
            "image": image,
            "mask": mask,
        }
        return self.pack.EncodeSubject.execute(**{**given, **inputs}).args[0]

    def prompt(self, seed: int, guidance: float = 3.5) -> Any:
        """A conditioning with random states."""
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(1, TEXT, CONFIG.transformer.context_dim, generator=generator)
        pooled = torch.randn(1, POOLED, generator=generator)
        return [[states, {"pooled_output": pooled, "guidance": guidance}]]

    def route(self, *subjects: Any, mode: str = "learned", masks: Any = ()) -> Any:
        inputs = {f"subject_{i}": s for i, s in enumerate(subjects or self.subjects, 1)}
        inputs |= {f"mask_{i}": m for i, m in enumerate(masks, 1)}
        return self.pack.SubjectRouter.execute(anystory=self.anystory, mode=mode, **inputs).args[0]

    def apply(self, routing: Any = None, model: Any = None, **settings: Any) -> Any:
        return self.apply_with_maps(routing, model, **settings)[0]

    def apply_with_maps(self, routing: Any = None, model: Any = None, **settings: Any) -> Any:
        return self.pack.ApplyAnyStory.execute(
            model=model or self.model, routing=routing or self.route(), **settings
        ).args

    def latent(self, height: int = 8, width: int = 10, batch: int = 1) -> dict[str, Any]:
        return {"samples": torch.zeros(batch, CONFIG.transformer.channels, height, width)}

    def sample(self, model: Any = None, **options: Any) -> Tensor:
        """KSampler's latent (B,4,h,w)."""
        given = {
            "seed": 0,
            "steps": 6,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "positive": self.positive,
            "negative": self.prompt(2),
            "latent_image": self.latent(),
            "denoise": 1.0,
        }
        model = self.model if model is None else model
        (latent,) = self.comfy.KSampler().sample(model, **{**given, **options})
        return latent["samples"]

    @staticmethod
    def halves() -> list[Tensor]:
        return halves()
