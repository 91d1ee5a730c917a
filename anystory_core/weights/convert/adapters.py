"""IP-Adapter Plus in public files: its names, its sizes, and a named error for each kind of adapter
that is not it.

Public files call its tensors ``image_proj.*`` and ``ip_adapter.N.to_k_ip.weight``; diffusers, which
stores an adapter inside its U-Net, ``encoder_hid_proj.image_projection_layers.0.*`` and
``down_blocks...attn2.processor.to_k_ip.0.weight``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...bases.sdxl.config import AnyStoryConfig
from ...bases.sdxl.sites import UNetSite
from ...config import QFormerConfig
from ...errors import CheckpointError
from ..fingerprint import file_sha256
from .sources import Source
from .unets import TEXT_WIDTHS

# The public "plus-face" file has the very tensor names and shapes of the general one.
_FACE_FILES = {"677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1"}

_LAYER = re.compile(r"layers\.(\d+)\.(0|1)\.(.+)")
_LAYER_MEMBERS = {
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}


def adapter_names(ours: str, site: UNetSite | None) -> tuple[str, ...]:
    """Name in an IP-Adapter file of one of our tensors: of the QFormer (``latents``,
    ``layers.0.0.to_q.weight`` ...), or of a block's ``to_k.weight``."""
    if site is None:
        return (f"image_proj.{ours}",)
    return (f"ip_adapter.{site.ip_adapter}.{_ip(ours, '')}",)


def diffusers_adapter_names(ours: str, site: UNetSite | None) -> tuple[str, ...]:
    """As :func:`adapter_names` in a diffusers U-Net. Two names: their rows follow one another."""
    if site is not None:
        return (f"{site.diffusers}.attn2.processor.{_ip(ours, '.0')}",)
    prefix = "encoder_hid_proj.image_projection_layers.0."
    match = _LAYER.fullmatch(ours)
    if match is None:
        return (prefix + ours,)
    layer, half, rest = match.groups()
    member, _, leaf = f"{half}.{rest}".rpartition(".")
    if member == "0.to_kv":
        return tuple(f"{prefix}layers.{layer}.attn.{m}.{leaf}" for m in ("to_k", "to_v"))
    return (f"{prefix}layers.{layer}.{_LAYER_MEMBERS[member]}.{leaf}",)


def _ip(ours: str, index: str) -> str:
    """``to_k.weight`` -> ``to_k_ip.weight``, with diffusers' adapter number in between."""
    member, leaf = ours.split(".")
    return f"{member}_ip{index}.{leaf}"


@dataclass(frozen=True)
class Adapter:
    """An IP-Adapter Plus file. ``diffusers``: stored inside a U-Net, with diffusers' names."""

    source: Source
    diffusers: bool

    def keys(self, ours: str, site: UNetSite | None) -> tuple[str, ...]:
        """Names in the file of one of our tensors, as :func:`adapter_names` takes it."""
        return (diffusers_adapter_names if self.diffusers else adapter_names)(ours, site)

    def qformer(self, head_dim: int) -> QFormerConfig:
        """The QFormer's sizes as its tensors tell them, all but the width of a head.
        CheckpointError: a tensor is missing."""
        shapes = self.source.shapes

        def rows(ours: str) -> int:
            keys = self.keys(ours, None)
            missing = [key for key in keys if key not in shapes]
            if missing:
                raise CheckpointError(
                    f"{self.source.name}: tensor {missing[0]} is missing; get the file again"
                )
            return sum(shapes[key][0] for key in keys)

        (latents,) = self.keys("latents", None)
        _, queries, width = shapes[latents]
        layers = 0
        while self.keys(f"layers.{layers}.0.to_q.weight", None)[0] in shapes:
            layers += 1
        return QFormerConfig(
            queries=queries,
            width=width,
            layers=max(1, layers),
            heads=rows("layers.0.0.to_q.weight") // head_dim,
            head_dim=head_dim,
            ff_mult=rows("layers.0.1.1.weight") // width,
            output_dim=rows("proj_out.weight"),
        )


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
                f"{source.name}: it is for {TEXT_WIDTHS.get(text, 'another base')} (text states of "
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
