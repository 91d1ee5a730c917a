"""The frozen base of a training run: U-Net, VAE, text encoders and CLIP vision, without any hub.

Layouts of ``base.path``:

- a folder as diffusers saves SDXL: ``unet/``, ``vae/``, ``text_encoder/`` and, for SDXL,
  ``text_encoder_2/``; ``image_encoder/`` too, unless ``base.clip_vision`` names another folder.
  Captions are tokenised by open_clip's copy of CLIP's tokenizer, so tokenizer folders are not read.
  The mini recipe writes such a folder, with one text encoder and TAESD's VAE;
- an SDXL ``.safetensors`` file, with ``base.clip_vision`` set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from ...bases.sdxl.config import AnyStoryConfig
from ...errors import ConfigError, ModelMismatchError
from ...weights.fingerprint import weights_fingerprint
from ..config import BaseSettings
from .single_file import load_single_file
from .sizes import diffusers_unet_config

TextEncoder = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass
class Base:
    """All frozen networks, in evaluation mode. ``fingerprint`` names them in caches."""

    config: AnyStoryConfig
    unet: Any
    vae: Any
    text: TextEncoder  # captions -> states (B,77,C), pooled (B,P)
    clip_vision: Any
    modules: tuple[Any, ...]  # what has to move to the device
    fingerprint: str

    def to(self, device: torch.device, dtype: torch.dtype) -> Base:
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
        alone = pixels.device.type == "cpu"
        with torch.autocast(pixels.device.type, enabled=False):  # a training step asks for it
            encoded = [self.vae.encode(p) for p in pixels_last.split(1 if alone else len(pixels))]
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


def load_base(settings: BaseSettings) -> Base:
    """Load and check a base. ConfigError or ModelMismatchError says what does not fit."""
    config = _model_config(settings.model)
    path = Path(settings.path)
    clip_folder = Path(settings.clip_vision) if settings.clip_vision else path / "image_encoder"
    if not clip_folder.is_dir():
        raise ConfigError(
            f"base.clip_vision: {clip_folder} is not a folder; name the folder of the CLIP vision "
            "model (transformers layout: config.json and model.safetensors)"
        )
    if path.is_dir():
        _check_prediction(path)
        unet, vae, encoders = _from_folder(path)
    elif path.is_file():
        unet, vae, encoders = load_single_file(path, config)
    else:
        raise ConfigError(f"base.path: {path} does not exist; name a folder or an SDXL file")
    _check_unet(unet, config, path)
    clip_vision = _clip_vision(clip_folder, config)
    modules = (unet, vae, *encoders, clip_vision)
    for module in modules:
        module.eval().requires_grad_(False)
    name = weights_fingerprint(vae, *encoders, clip_vision)
    return Base(config, unet, vae, text_encoder(encoders), clip_vision, modules, name)


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


def _from_folder(path: Path) -> tuple[Any, Any, list[Any]]:
    import diffusers
    import transformers

    for name in ("unet", "vae", "text_encoder"):
        if not (path / name / "config.json").exists():
            raise ConfigError(f"base.path: {path} has no {name}/config.json; see docs/training.md")
    unet = _pretrained(diffusers.UNet2DConditionModel, path / "unet", "base.path")
    kind = str(_settings(path / "vae").get("_class_name"))
    vae = _pretrained(getattr(diffusers, kind, None), path / "vae", "base.path")
    encoders: list[Any] = []
    for folder in ("text_encoder", "text_encoder_2"):
        if (path / folder).is_dir():
            # With a projection or without, as the folder's config.json says.
            names = _settings(path / folder).get("architectures") or ["CLIPTextModel"]
            kind = getattr(transformers, str(names[0]), None)
            encoders.append(_pretrained(kind, path / folder, "base.path"))
    return unet, vae, encoders


def _settings(path: Path) -> dict[str, Any]:
    """A JSON file, or a folder's config.json."""
    file = path if path.suffix == ".json" else path / "config.json"
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"base.path: {file} cannot be read ({error}); get it again") from error
    if not isinstance(table, dict):
        raise ConfigError(f"base.path: {file} holds no table; get it again")
    return cast("dict[str, Any]", table)


def _pretrained(kind: Any, path: Path, field: str) -> Any:
    """``kind.from_pretrained(path)``, where a missing tensor is an error and no random weight."""
    if kind is None:
        raise ConfigError(f"{field}: {path}/config.json names a class that is not known")
    try:
        model, info = kind.from_pretrained(
            path, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(f"{field}: {path} cannot be read ({detail}); get it again") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"{field}: {path} lacks {len(missing)} tensors, such as {missing[0]}; get it again"
        )
    return model


def _check_unet(unet: Any, config: AnyStoryConfig, path: Path) -> None:
    for name, wanted in diffusers_unet_config(config.unet).items():
        if name == "sample_size":
            continue
        got = unet.config[name]
        if isinstance(wanted, tuple):
            count = len(cast("tuple[Any, ...]", wanted))
            got = tuple(got) if isinstance(got, list | tuple) else (got,) * count
        if got != wanted:
            raise ModelMismatchError(
                f"base.path: {path.name} has {name} = {got}, the model {config.name!r} expects "
                f"{wanted}; choose a base of that family or set base.model"
            )


def _check_prediction(folder: Path) -> None:
    """ModelMismatchError unless the pipeline's scheduler, where there is one, is for networks that
    predict the noise, as Eq. 1 is."""
    settings = folder / "scheduler" / "scheduler_config.json"
    found = _settings(settings).get("prediction_type", "epsilon") if settings.is_file() else None
    if found not in (None, "epsilon"):
        raise ModelMismatchError(
            f"base.path: {folder.name} predicts {found!r}; Eq. 1 is for 'epsilon', so choose a "
            "base that predicts the noise"
        )


def _clip_vision(path: Path, config: AnyStoryConfig) -> Any:
    from transformers import CLIPVisionModelWithProjection

    model = _pretrained(CLIPVisionModelWithProjection, path, "base.clip_vision")
    got = (model.config.hidden_size, model.config.num_hidden_layers, model.config.image_size)
    wanted = (config.clip.width, config.clip.layers, config.clip.image_size)
    if got != wanted:
        raise ModelMismatchError(
            f"base.clip_vision: {path} has width, layers, picture size {got}, expected {wanted}"
        )
    return model


def text_encoder(encoders: Sequence[Any]) -> TextEncoder:
    """SDXL's rule for two encoders: penultimate states side by side, pooled of the second; the
    first pads with the end token, the second with 0. One encoder alone (mini): its normalised last
    states and its pooled state."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = cast(Any, SimpleTokenizer)()

    def tokens(captions: Sequence[str], padding: int, device: Any) -> Tensor:
        rows = tokenizer(list(captions), context_length=77)
        ends = rows.argmax(dim=1)  # the end token has the largest number
        after = torch.arange(77)[None] > ends[:, None]
        return torch.where(after, padding, rows).to(device)

    @torch.no_grad()
    def encode(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        first = encoders[0]
        if len(encoders) == 1:
            out = first(tokens(captions, 49407, first.device))
            return out.last_hidden_state, out.pooler_output
        second = encoders[1]
        small = first(tokens(captions, 49407, first.device), output_hidden_states=True)
        large = second(tokens(captions, 0, second.device), output_hidden_states=True)
        states = torch.cat((small.hidden_states[-2], large.hidden_states[-2]), dim=-1)
        return states, large.text_embeds

    return encode
