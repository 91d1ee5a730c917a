"""An SDXL ``.safetensors`` file -> the networks of a base. Names are changed by diffusers' own
converters; the sizes that a file does not state are :class:`FileSizes`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor

from ...bases.sdxl.config import AnyStoryConfig
from ...bases.sdxl.names import ldm_to_diffusers
from ...bases.sdxl.prediction import Prediction, prediction_of_file
from ...errors import ModelMismatchError
from ...tensor_files import raw_header, read_tensors
from ..libraries import library
from .sizes import diffusers_unet_config

_UNET = "model.diffusion_model."
_SMALL_TEXT = "conditioner.embedders.0.transformer."
_LARGE_TEXT = "conditioner.embedders.1.model."


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """One CLIP text encoder; its MLP is four times as wide."""

    width: int
    layers: int
    heads: int
    activation: str


@dataclass(frozen=True, kw_only=True)
class FileSizes:
    """What lies beside the U-Net: CLIP-L, CLIP-G and the VAE's width at each level."""

    small: TextSizes = TextSizes(width=768, layers=12, heads=12, activation="quick_gelu")
    large: TextSizes = TextSizes(width=1280, layers=32, heads=20, activation="gelu")
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)


def load_single_file(
    path: Path, config: AnyStoryConfig, sizes: FileSizes | None = None
) -> tuple[Any, Any, list[Any]]:
    """(U-Net, VAE, text encoders) of a file. ModelMismatchError names what does not fit."""
    try:
        state = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise ModelMismatchError(
            f"base.path: {path} is not a readable .safetensors file ({error}); get it again"
        ) from error
    return networks_of(state, config, path.name, sizes or FileSizes())


def file_prediction(path: Path) -> Prediction:
    """What a file's U-Net predicts: the noise, where it does not say."""
    header = raw_header(path)
    said = cast("dict[str, str]", header.pop("__metadata__", None) or {})
    return prediction_of_file(header, said)


def networks_of(
    state: Mapping[str, Tensor], config: AnyStoryConfig, name: str, sizes: FileSizes
) -> tuple[Any, Any, list[Any]]:
    """(U-Net, VAE, text encoders) of the tensors of the file ``name``. ModelMismatchError says what
    does not fit."""
    diffusers, transformers = library("diffusers"), library("transformers")
    tools = library("diffusers.loaders.single_file_utils")
    if f"{_UNET}input_blocks.0.0.weight" not in state:
        raise ModelMismatchError(f"base.path: {name} holds no U-Net of Stable Diffusion's kind")
    unet = diffusers.UNet2DConditionModel(**diffusers_unet_config(config.unet))
    table = ldm_to_diffusers(config).items()
    renamed = {new: state[_UNET + old] for old, new in table if _UNET + old in state}
    _load(unet, renamed, name, "U-Net")
    levels = len(sizes.vae_widths)
    vae = diffusers.AutoencoderKL(
        block_out_channels=sizes.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        latent_channels=config.unet.in_channels,
        sample_size=1024,
    )
    _load(vae, tools.convert_ldm_vae_checkpoint(dict(state), vae.config), name, "VAE")
    small = transformers.CLIPTextModel(_text_config(sizes.small))
    own = {k: v for k, v in state.items() if k.startswith(_SMALL_TEXT)}
    _load(small, tools.convert_ldm_clip_checkpoint(own, _SMALL_TEXT), name, "CLIP-L")
    large = transformers.CLIPTextModelWithProjection(_text_config(sizes.large))
    own = {k: v for k, v in state.items() if k.startswith(_LARGE_TEXT)}
    _load(large, tools.convert_open_clip_checkpoint(large, own, _LARGE_TEXT), name, "CLIP-G")
    return unet, vae, [small, large]


def _text_config(sizes: TextSizes) -> Any:
    return library("transformers").CLIPTextConfig(
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        projection_dim=sizes.width,
        hidden_act=sizes.activation,
    )


def _load(module: Any, state: dict[str, Tensor], name: str, part: str) -> None:
    """Strict, except for the position ids that some files keep. transformers 5 has no
    ``text_model`` around the encoder without a projection."""
    flat = "" if hasattr(module, "text_model") else "text_model."
    state = {k.removeprefix(flat): v for k, v in state.items() if not k.endswith("position_ids")}
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).splitlines()[1:3])[:300]
        raise ModelMismatchError(
            f"base.path: {name} is no SDXL file ({part}: {detail.strip()}); choose one, or a "
            "folder in diffusers' layout"
        ) from error
