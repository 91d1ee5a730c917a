"""The U-Net in public files: single files and diffusers folders, and a named error for each kind
that is no SDXL U-Net."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...bases.sdxl.config import AnyStoryConfig
from ...bases.sdxl.names import LDM_PREFIX, diffusers_modules, diffusers_name
from ...bases.sdxl.prediction import prediction_of_scheduler
from ...errors import CheckpointError
from ..folders import network_files
from .sources import Source

_UNET_FILE = "diffusion_pytorch_model"
# Bases by the width of their text states.
TEXT_WIDTHS = {
    768: "Stable Diffusion 1.5",
    1024: "Stable Diffusion 2",
    1280: "the SDXL refiner",
    4096: "a transformer model such as Flux",
}


@dataclass(frozen=True)
class PublicUNet:
    """A U-Net in public files: tensors of ``source`` whose names begin with ``prefix``, in
    diffusers' naming when ``diffusers`` (modules by their ldm names) is set, else in ldm's."""

    source: Source
    prefix: str
    diffusers: Mapping[str, str] | None
    notes: tuple[str, ...]

    def key(self, ldm: str) -> str:
        """Name in the file of the U-Net's tensor ``ldm``."""
        named = ldm if self.diffusers is None else diffusers_name(self.diffusers, ldm)
        return self.prefix + named


def open_unet(path: Path, config: AnyStoryConfig) -> PublicUNet:
    """An SDXL U-Net from a single file or a diffusers folder (of the pipeline or of its U-Net).

    CheckpointError: another family, an inpainting or refiner variant, a LoRA, not weights at all.
    """
    files, scheduler = _unet_files(path)
    source = Source.open(files, path.name)
    prediction = prediction_of_scheduler(scheduler) if scheduler else source.prediction
    try:
        prefix, diffusers = _naming(source)
        convolution = "conv_in.weight" if diffusers else "input_blocks.0.0.weight"
        _check_family(source, prefix, convolution, config)
        notes: list[str] = []
        if prediction.kind != "epsilon":
            kind = "v" if prediction.kind == "v" else prediction.mark
            notes.append(
                f"{path.name} predicts {kind}. Its features and attention maps are used as they "
                "are, which no prediction type enters; the public IP-Adapter, however, was trained "
                "on plain SDXL and may fit this model less well."
            )
        modules = diffusers_modules(config.unet) if diffusers else None
        return PublicUNet(source, prefix, modules, tuple(notes))
    except BaseException:
        source.close()
        raise


def _unet_files(path: Path) -> tuple[tuple[Path, ...], Mapping[str, Any]]:
    """The safetensors files of a checkpoint, and a folder's scheduler, empty where none is."""
    if path.is_file():
        return (path,), {}
    if not path.is_dir():
        raise CheckpointError(
            f"{path.name}: no such file or folder; give a .safetensors file, or a diffusers folder"
        )
    folder = path / "unet" if (path / "unet").is_dir() else path
    found = network_files(folder, _UNET_FILE)
    if found is None:
        raise CheckpointError(
            f"{path.name}: no {_UNET_FILE}*.safetensors in {folder.name}; give a .safetensors "
            "file, or a diffusers folder saved as safetensors"
        )
    return found.files, _json(path / "scheduler" / "scheduler_config.json")


def _json(path: Path) -> Mapping[str, Any]:
    """A JSON table, empty when the file is not there. CheckpointError when it is not JSON."""
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name}: is not JSON ({error}); get it again") from error
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}


def _naming(source: Source) -> tuple[str, bool]:
    """(prefix, is it diffusers' naming) of the U-Net inside a file."""
    for prefix in (LDM_PREFIX, ""):
        if f"{prefix}input_blocks.0.0.weight" in source.shapes:
            return prefix, False
    for prefix in ("", "unet."):
        if f"{prefix}conv_in.weight" in source.shapes and any(
            key.startswith(f"{prefix}down_blocks.") for key in source.shapes
        ):
            return prefix, True
    keys = source.shapes
    if any(re.search(r"lora_(down|up|A|B)\b|\.lokr_|\.hada_|\.oft_", key) for key in keys):
        kind = "a LoRA; give the checkpoint that it changes (LoRAs are applied while sampling)"
    elif any(key.startswith(("image_proj.", "ip_adapter.")) for key in keys):
        kind = "an IP-Adapter; give it as the IP-Adapter, and an SDXL checkpoint here"
    elif any(".double_blocks." in f".{key}" or ".joint_blocks." in f".{key}" for key in keys):
        kind = "a transformer model (Flux or SD3); give an SDXL checkpoint"
    elif any(key.startswith(("encoder.", "projections.", "reference_net.")) for key in keys):
        kind = "already an AnyStory file; load it as it is"
    else:
        kind = "no U-Net; give an SDXL checkpoint"
    raise CheckpointError(f"{source.name}: it is {kind}")


def _check_family(source: Source, prefix: str, convolution: str, config: AnyStoryConfig) -> None:
    """CheckpointError unless the U-Net is of the family of ``config``."""
    unet = config.unet
    width, channels = source.shapes[prefix + convolution][:2]
    text = next(
        (
            shape[-1]
            for key, shape in source.shapes.items()
            if key.startswith(prefix) and key.endswith("attn2.to_k.weight")
        ),
        0,
    )
    wanted = f"expected {config.name} ({unet.context_dim}); give an {config.name} checkpoint"
    if "edm_mean" in source.shapes:
        raise CheckpointError(
            f"{source.name}: it is Playground 2.5, whose latents have another scale for each "
            f"channel; give an {config.name} checkpoint with the usual latents"
        )
    if text != unet.context_dim or width != unet.model_channels:
        kind = TEXT_WIDTHS.get(text, "another model")
        raise CheckpointError(
            f"{source.name}: it is {kind} (text states of width {text}), {wanted}"
        )
    if channels != unet.in_channels:
        kind = {9: "an inpainting", 8: "an edit (InstructPix2Pix)"}.get(channels, "another")
        raise CheckpointError(
            f"{source.name}: it is {kind} U-Net: its first convolution takes {channels} channels, "
            f"expected {unet.in_channels}; give the plain checkpoint that it was made from"
        )
