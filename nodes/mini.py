"""LoadAnyStoryMini: the small model that ships with the pack, through the host's own classes."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.taesd.taesd
import torch
from comfy_api.latest import io

from ..anystory_core.mini import config as mini
from ..anystory_core.mini import weights
from ..anystory_core.weights.checkpoint import load_model
from ..anystory_core.weights.model import build_model
from .host import ids
from .host.managed import OPERATIONS, ManagedAnyStory


class MiniLatent(comfy.latent_formats.LatentFormat):
    """The mini VAE's latents: already at unit scale."""

    scale_factor = 1.0

    def __init__(self) -> None:
        self.latent_rgb_factors = [list(row) for row in mini.LATENT_RGB_FACTORS]
        self.latent_rgb_factors_bias = list(mini.LATENT_RGB_BIAS)


class MiniModel(comfy.supported_models.SDXL):
    """SDXL at the mini sizes. Built here, so the host's list of known models stays as it is."""

    latent_format = MiniLatent
    unet_extra_config: dict[str, Any] = {}


class MiniTextModel(comfy.sd1_clip.SDClipModel):
    """CLIP text transformer of the mini sizes."""

    def __init__(
        self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(mini.TEXT),
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class MiniClip(comfy.sd1_clip.SD1ClipModel):
    """The text model under the name that the tokenizer of SD 1 uses."""

    def __init__(
        self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options or {},
            clip_model=MiniTextModel,
        )


def _fill(module: torch.nn.Module, part: str) -> None:
    """Load a part's weights into a module, strictly; say so when they are random."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    state, trained = weights.load_state(part, shapes)
    if not trained:
        logging.warning("AnyStory mini: %s has no trained weights, random ones are used.", part)
    module.load_state_dict(state, strict=True)


def load_unet() -> Any:
    """ModelPatcher of a ``model_base.SDXL`` at the mini sizes."""
    load_device = mm.get_torch_device()
    settings = MiniModel(mini.unet_arguments())
    dtype = mm.unet_dtype(supported_dtypes=settings.supported_inference_dtypes)
    settings.set_inference_dtype(
        dtype, mm.unet_manual_cast(dtype, load_device, settings.supported_inference_dtypes)
    )
    offload_device = mm.unet_offload_device()
    # The host reads from such names what a network predicts, the noise or v, and on which schedule.
    model = settings.get_model(weights.marks("unet"), "", device=offload_device)
    _fill(model.diffusion_model, "unet")
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(model, load_device=load_device, offload_device=offload_device)


def load_clip() -> comfy.sd.CLIP:
    """The host's CLIP object around the mini text encoder."""
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, MiniClip)
    clip = comfy.sd.CLIP(target)
    _fill(clip.cond_stage_model.clip_l.transformer, "clip_text")
    return clip


def load_vae() -> comfy.sd.VAE:
    """The host recognises TAESD's layout by its key names."""
    blank = comfy.taesd.taesd.TAESD()
    _fill(blank, "vae")
    vae = comfy.sd.VAE(sd=blank.state_dict())
    vae.throw_exception_if_invalid()
    return vae


def load_clip_vision() -> Any:
    """The host's ClipVisionModel, which takes its sizes from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip_vision.json"
        path.write_text(json.dumps(mini.VISION))
        clip_vision = comfy.clip_vision.ClipVisionModel(str(path))
    _fill(clip_vision.model, "clip_vision")
    return clip_vision


def load_anystory() -> ManagedAnyStory:
    """The mini AnyStory weights."""
    path = weights.path("anystory")
    if path.exists():
        return ManagedAnyStory(load_model(path, operations=OPERATIONS), "mini")
    model = build_model(mini.CONFIG, operations=OPERATIONS)
    for prefix, module in model.modules():
        state = {
            name: weights.random_tensor(f"{prefix}.{name}", tuple(tensor.shape))
            for name, tensor in module.state_dict().items()
        }
        module.load_state_dict(state, strict=True)
        module.eval().requires_grad_(False)
    model.fingerprint = "mini-random"
    logging.warning("AnyStory mini: anystory has no trained weights, random ones are used.")
    return ManagedAnyStory(model, "mini")


class LoadAnyStoryMini(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return ids.schema(
            node_id="LoadAnyStoryMini",
            display_name="Load AnyStory Mini",
            category=ids.CATEGORY,
            description="The small model that ships with this pack: everything needed for a first "
            "picture, with no download. 320x320 pictures of emoji-like subjects.",
            search_aliases=["anystory demo"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
                io.ClipVision.Output(display_name="clip_vision"),
                ids.AnyStory.Output(display_name="anystory"),
            ],
        )

    @classmethod
    @ids.named_errors
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(
            load_unet(), load_clip(), load_vae(), load_clip_vision(), load_anystory()
        )
