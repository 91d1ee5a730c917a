"""The frozen base of a training run: U-Net, VAE, text encoders and CLIP vision, without any hub.

Layouts of ``base.path``:

- a folder as diffusers saves SDXL: ``unet/``, ``vae/``, ``text_encoder/`` and, for SDXL,
  ``text_encoder_2/``; ``image_encoder/`` too, unless ``base.clip_vision`` names another folder.
  Captions are tokenised by open_clip's copy of CLIP's tokenizer, so tokenizer folders are not read.
  The mini recipe writes such a folder, with one text encoder and TAESD's VAE;
- an SDXL ``.safetensors`` file, with ``base.clip_vision`` set.

Files of a folder may be of a variant (``diffusion_pytorch_model.fp16.safetensors``) or in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...bases.sdxl.config import AnyStoryConfig
from ...bases.sdxl.prediction import Prediction
from ...errors import ConfigError, ModelMismatchError
from ...weights.fingerprint import weights_fingerprint
from ..settings import BaseSettings
from .folder import check_folder, folder_prediction, load_clip_vision, load_folder
from .single_file import file_prediction, load_single_file
from .sizes import diffusers_unet_config
from .text import TextEncoder, text_encoder

_PREDICTIONS = {
    "epsilon": Prediction(),
    "v": Prediction("v"),
    "v_zero_snr": Prediction("v", zero_snr=True),
}


@dataclass
class FrozenNetworks:
    """All frozen networks, in evaluation mode. ``fingerprint`` names them in caches."""

    config: AnyStoryConfig
    unet: Any
    vae: Any
    text: TextEncoder  # captions -> states (B,77,C), pooled (B,P)
    clip_vision: Any
    modules: tuple[Any, ...]  # what has to move to the device
    fingerprint: str
    prediction: Prediction = Prediction()  # of the U-Net

    def to(self, device: torch.device, dtype: torch.dtype) -> FrozenNetworks:
        """Move everything; the VAE stays in float32, where SDXL's is stable, unless it is one of
        TAESD's layout, which is stable in every precision."""
        tiny = type(self.vae).__name__ == "AutoencoderTiny"
        for module in self.modules:
            module.to(device, torch.float32 if module is self.vae and not tiny else dtype)
        # Its convolutions are most of the first epoch; measured on a CPU in bfloat16: 0.64 of the
        # time in this layout.
        self.vae.to(memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def encode_picture(self, pixels: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1] -> latents (B,4,h,w) at U-Net scale."""
        pixels_last = pixels.to(self.vae.dtype, memory_format=torch.channels_last)
        # On a CPU one at a time: a picture's layers stay in its cache, which halved the time.
        size = 1 if pixels.device.type == "cpu" else len(pixels)
        with torch.autocast(pixels.device.type, enabled=False):  # a training step asks for it
            encoded = [self.vae.encode(p) for p in torch.split(pixels_last, size)]
        raw = torch.cat(
            [out.latents if hasattr(out, "latents") else out.latent_dist.mode() for out in encoded]
        )
        reference = self.config.reference
        return ((raw - reference.latent_shift) * reference.latent_scale).to(pixels.dtype)

    @torch.no_grad()
    def decode_picture(self, latents: Tensor) -> Tensor:
        """Latents at U-Net scale -> (B,3,H,W) in [-1,1]."""
        reference = self.config.reference
        raw = latents / reference.latent_scale + reference.latent_shift
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(raw.to(self.vae.dtype)).sample.clamp(-1, 1)

    @torch.no_grad()
    def clip_states(self, pixels: Tensor) -> Tensor:
        """Penultimate hidden states (B,S,W) of pixels normalised for CLIP (B,3,S,S)."""
        dtype = next(self.clip_vision.parameters()).dtype
        return penultimate(self.clip_vision, pixels.to(dtype))


def penultimate(clip_vision: Any, pixels: Tensor) -> Tensor:
    """What the subject encoder reads: the last layer but one of transformers' CLIP vision encoder,
    (B,S,W) of normalised pixels (B,3,S,S)."""
    return clip_vision(pixels, output_hidden_states=True).hidden_states[-2]


def load_frozen(settings: BaseSettings) -> FrozenNetworks:
    """Load and check a base. ConfigError or ModelMismatchError says what does not fit."""
    config = _model_config(settings.model)
    path = Path(settings.path)
    clip_folder = Path(settings.clip_vision) if settings.clip_vision else path / "image_encoder"
    if not clip_folder.is_dir():
        raise ConfigError(
            f"base.clip_vision: {clip_folder} is not a folder; name the folder of the CLIP vision "
            "model (transformers layout: config.json and model.safetensors)"
        )
    asked = _PREDICTIONS.get(settings.prediction)
    if path.is_dir():
        check_folder(path)
        prediction = _usable(asked or folder_prediction(path), path)
        unet, vae, encoders = load_folder(path)
    elif path.is_file():
        prediction = _usable(asked or file_prediction(path), path)
        unet, vae, encoders = load_single_file(path, config)
    else:
        raise ConfigError(f"base.path: {path} does not exist; name a folder or an SDXL file")
    _check_unet(unet, config, path)
    clip_vision = load_clip_vision(clip_folder, config)
    modules = (unet, vae, *encoders, clip_vision)
    for module in modules:
        module.eval().requires_grad_(False)
    name = weights_fingerprint(vae, *encoders, clip_vision)
    return FrozenNetworks(
        config, unet, vae, text_encoder(encoders), clip_vision, modules, name, prediction
    )


def _usable(prediction: Prediction, path: Path) -> Prediction:
    """ModelMismatchError unless the stages can train on it."""
    if prediction.kind == "other":
        raise ModelMismatchError(
            f"base.path: {path.name} predicts neither the noise nor v ({prediction.mark}); choose "
            "a base that predicts one of them"
        )
    return prediction


def _model_config(name: str) -> AnyStoryConfig:
    """ "sdxl", "mini", or a JSON file as :meth:`AnyStoryConfig.to_json` writes it."""
    if name == "sdxl":
        return AnyStoryConfig.sdxl()
    if name == "mini":
        return AnyStoryConfig.mini()
    try:
        return AnyStoryConfig.from_json(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"base.model: got {name!r}, expected 'sdxl', 'mini' or a JSON file of a configuration"
        ) from error


def _check_unet(unet: Any, config: AnyStoryConfig, path: Path) -> None:
    for name, wanted in diffusers_unet_config(config.unet).items():
        if name == "sample_size":
            continue
        got = unet.config[name]
        if isinstance(wanted, tuple):
            count = len(cast("tuple[Any, ...]", wanted))
            several = isinstance(got, list | tuple)
            got = tuple(cast("list[Any]", got)) if several else (got,) * count
        if got != wanted:
            raise ModelMismatchError(
                f"base.path: {path.name} has {name} = {got}, the model {config.name!r} expects "
                f"{wanted}; choose a base of that family or set base.model"
            )
