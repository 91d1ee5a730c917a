"""Opening public weights: what kind of file it is, and a named error for each kind that is not it.

Only headers are read to decide. Nothing is ever unpickled: ``.bin``, ``.ckpt`` and ``.pt`` files
are refused by name.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor

from ...bases.sdxl.config import AnyStoryConfig
from ...bases.sdxl.names import LDM_PREFIX
from ...errors import CheckpointError
from ...tensor_files import FLOATS, TensorFile, open_tensors, raw_header
from ..fingerprint import file_sha256

_UNET_FILE = "diffusion_pytorch_model"
# The public "plus-face" file has the very tensor names and shapes of the general one.
_FACE_FILES = {"677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1"}
# What stands beside a scaled weight, in the host's older format and its present one.
_SCALES = ("scale_weight", "weight_scale", "comfy_quant")
_BASES = {
    768: "Stable Diffusion 1.5",
    1024: "Stable Diffusion 2",
    1280: "the SDXL refiner",
    4096: "a transformer model such as Flux",
}


@dataclass
class Source:
    """The tensors of one or several safetensors files, read one by one when asked for."""

    name: str  # for messages
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    owner: dict[str, Path]
    scaled: set[Path] = field(default_factory=set[Path])  # files that say so in their headers
    _open: dict[Path, TensorFile] = field(default_factory=dict[Path, TensorFile])
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @classmethod
    def open(cls, files: Sequence[Path], name: str) -> Source:
        """Open files and read their headers. CheckpointError: not safetensors, or cut off."""
        source = cls(name, tuple(files), {}, {}, {})
        try:
            for path in files:
                _check_suffix(path)
                entries = raw_header(path)
                # The library compares every offset with the file's size: a cut file ends here.
                source._open[path] = source._stack.enter_context(open_tensors(path))
                metadata = entries.pop("__metadata__", None)
                if isinstance(metadata, dict) and "_quantization_metadata" in metadata:
                    source.scaled.add(path)
                for key, entry in entries.items():
                    info = cast("dict[str, Any]", entry)
                    source.shapes[key] = tuple(int(n) for n in info["shape"])
                    source.dtypes[key] = str(info["dtype"])
                    source.owner[key] = path
        except (SafetensorError, OSError) as error:
            source.close()
            raise CheckpointError(
                f"{name}: cannot be read, it is cut off or damaged ({error}); get it again"
            ) from error
        except BaseException:
            source.close()
            raise
        return source

    def get(self, key: str) -> Tensor:
        """One tensor, from the file that has it."""
        try:
            return self._open[self.owner[key]].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.name}: tensor {key} cannot be read ({error}); get the file again"
            ) from error

    def check_floats(self, keys: Sequence[str]) -> None:
        """CheckpointError unless these tensors are plain floats (not quantised)."""
        for key in keys:
            layer = key.removesuffix("weight")
            scaled = any(layer + mark in self.shapes for mark in _SCALES)
            scaled |= self.owner[key] in self.scaled and self.dtypes[key].startswith("F8")
            if self.dtypes[key] not in FLOATS or scaled:
                kind = "scaled 8-bit" if scaled else self.dtypes[key]
                raise CheckpointError(
                    f"{self.name}: tensor {key} is quantised ({kind}), expected plain floats "
                    f"({', '.join(sorted(FLOATS))}); use the fp16 or bf16 file of this model"
                )

    def describe(self) -> str:
        """Names and SHA-256 of the files, for the header of what is made from them."""
        return ", ".join(f"{path.name} sha256:{file_sha256(path)}" for path in self.files)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_suffix(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path.name}: expected a .safetensors file; other kinds can hold programs and are "
            "never opened, so get the .safetensors version of it"
        )


@dataclass(frozen=True)
class Checkpoint:
    """A U-Net in public files: tensors of ``source`` whose names begin with ``prefix``, in
    diffusers' naming when ``diffusers`` is set, else in ldm's."""

    source: Source
    prefix: str
    diffusers: bool
    notes: tuple[str, ...]


def open_checkpoint(path: Path, config: AnyStoryConfig) -> Checkpoint:
    """An SDXL U-Net from a single file or a diffusers folder (of the pipeline or of its U-Net).

    CheckpointError: another family, an inpainting or refiner variant, a LoRA, not weights at all.
    """
    files, scheduler = _unet_files(path)
    source = Source.open(files, path.name)
    try:
        prefix, diffusers = _naming(source)
        convolution = "conv_in.weight" if diffusers else "input_blocks.0.0.weight"
        _check_family(source, prefix, convolution, config)
        notes: list[str] = []
        if "v_pred" in source.shapes or scheduler == "v_prediction":
            notes.append(
                f"{path.name} predicts v. Its features and attention maps are used as they are, "
                "which no prediction type enters; the public IP-Adapter, however, was trained on "
                "plain SDXL and may fit this model less well."
            )
        return Checkpoint(source, prefix, diffusers, tuple(notes))
    except BaseException:
        source.close()
        raise


def _unet_files(path: Path) -> tuple[list[Path], str | None]:
    """The safetensors files of a checkpoint, and the prediction type if a folder tells it."""
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise CheckpointError(
            f"{path.name}: no such file or folder; give a .safetensors file, or a diffusers folder"
        )
    folder = path / "unet" if (path / "unet").is_dir() else path
    scheduler = _json(path / "scheduler" / "scheduler_config.json").get("prediction_type")
    files: list[Path] = []
    for middle in ("", ".fp16", ".bf16"):
        index = folder / f"{_UNET_FILE}.safetensors.index{middle}.json"
        whole = folder / f"{_UNET_FILE}{middle}.safetensors"
        if whole.is_file():
            files = [whole]
        elif index.is_file():
            shards = cast("dict[str, str]", _json(index).get("weight_map") or {})
            files = [folder / Path(name).name for name in sorted(set(shards.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing or not files:
                raise CheckpointError(
                    f"{path.name}: {index.name} names {missing or 'no files'}, which are not in "
                    f"{folder.name}; get the whole folder again"
                )
        if files:
            return files, None if scheduler is None else str(scheduler)
    raise CheckpointError(
        f"{path.name}: no {_UNET_FILE}*.safetensors in {folder.name}; give a .safetensors file, or "
        "a diffusers folder saved as safetensors"
    )


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
        kind = _BASES.get(text, "another model")
        raise CheckpointError(
            f"{source.name}: it is {kind} (text states of width {text}), {wanted}"
        )
    if channels != unet.in_channels:
        kind = {9: "an inpainting", 8: "an edit (InstructPix2Pix)"}.get(channels, "another")
        raise CheckpointError(
            f"{source.name}: it is {kind} U-Net: its first convolution takes {channels} channels, "
            f"expected {unet.in_channels}; give the plain checkpoint that it was made from"
        )


@dataclass(frozen=True)
class Adapter:
    """An IP-Adapter Plus file. ``diffusers``: stored inside a U-Net, with diffusers' names."""

    source: Source
    diffusers: bool


def open_adapter(path: Path, config: AnyStoryConfig) -> Adapter:
    """An IP-Adapter Plus file for the base of ``config``, read with CLIP states of its encoder.

    CheckpointError: another kind (plain, FaceID, face) or base of IP-Adapter, or none at all.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.name}: no such file; give an IP-Adapter Plus .safetensors")
    if re.search(r"plus[-_ ]?face", path.name, re.IGNORECASE):
        _refuse_face(path.name)
    source = Source.open([path], path.name)
    try:
        shapes = source.shapes
        prefix = "encoder_hid_proj.image_projection_layers.0."
        diffusers = any(key.startswith(prefix) for key in shapes)
        prefix = prefix if diffusers else "image_proj."
        _check_kind(source, prefix)
        width = shapes[f"{prefix}proj_in.weight"][1]
        text = shapes[f"{prefix}proj_out.weight"][0]
        if text != config.unet.context_dim:
            raise CheckpointError(
                f"{source.name}: it is for {_BASES.get(text, 'another base')} (text states of "
                f"width {text}), expected {config.name} ({config.unet.context_dim}); the public "
                "one is ip-adapter-plus_sdxl_vit-h.safetensors"
            )
        if width != config.clip.width:
            raise CheckpointError(
                f"{source.name}: it reads picture states of width {width}, expected "
                f"{config.clip.width} (CLIP ViT-H); face adapters such as InstantID read 512, and "
                "Kolors 1024; the public one is ip-adapter-plus_sdxl_vit-h.safetensors"
            )
        if file_sha256(path) in _FACE_FILES:
            _refuse_face(path.name)
        return Adapter(source, diffusers)
    except BaseException:
        source.close()
        raise


def _refuse_face(name: str) -> None:
    raise CheckpointError(
        f"{name}: it is the 'plus-face' kind, trained on cropped faces only: it forgets clothes "
        "and things; give the general ip-adapter-plus_sdxl_vit-h.safetensors"
    )


def _check_kind(source: Source, prefix: str) -> None:
    """CheckpointError unless the file's picture part is the Plus kind's resampler."""
    keys = source.shapes
    if f"{prefix}latents" in keys and f"{prefix}proj_in.weight" in keys:
        face = any("_lora." in key and key.startswith("ip_adapter.") for key in keys)
        if not face:
            return
        kind = "a FaceID adapter (it carries LoRA tensors)"
    elif f"{prefix}perceiver_resampler.proj_in.weight" in keys:
        kind = "a FaceID Plus adapter"
    elif f"{prefix}proj.0.weight" in keys or f"{prefix}proj.net.0.proj.weight" in keys:
        face = keys.get(f"{prefix}proj.0.weight", (0, 512))[1] == 512
        kind = "a FaceID adapter" if face else "a full-face adapter"
    elif f"{prefix}proj.weight" in keys or f"{prefix}image_embeds.weight" in keys:
        kind = "a plain IP-Adapter (one CLIP vector), not the Plus kind"
    elif any(re.search(r"lora_(down|up|A|B)\b", key) for key in keys):
        kind = "a LoRA"
    elif any("input_blocks." in key or "down_blocks." in key for key in keys):
        kind = "a checkpoint without an IP-Adapter"
    else:
        kind = "no IP-Adapter"
    raise CheckpointError(
        f"{source.name}: it is {kind}; give an IP-Adapter Plus for SDXL and CLIP ViT-H, such as "
        "ip-adapter-plus_sdxl_vit-h.safetensors"
    )
