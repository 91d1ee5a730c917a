"""Which public adapter a file is, by the names and shapes of its tensors; the kinds that cannot be
used are named with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from ...errors import CheckpointError

Kind = Literal["IP-Adapter Plus", "MIP-Adapter", "MS-Diffusion"]
Shapes = Mapping[str, tuple[int, ...]]

INSIDE = "encoder_hid_proj.image_projection_layers.0."  # an adapter inside a diffusers U-Net
GATE = "text_to_weight.weight"
_PUBLIC = (
    "give an adapter for SDXL that reads whole pictures: ip-adapter-plus_sdxl_vit-h.safetensors, "
    "MIP-Adapter's model_sdxl_plus.bin or MS-Diffusion's ms_adapter.bin"
)


def recognise(name: str, shapes: Shapes) -> Kind:
    """The kind of the adapter in the file ``name``. CheckpointError: it is another one, or none."""
    if _begins(shapes, "ms_adapter.") and "image_proj.grounding_latents" in shapes:
        return "MS-Diffusion"
    prefix = INSIDE if _begins(shapes, INSIDE) else "image_proj."
    plus = f"{prefix}latents" in shapes and f"{prefix}proj_in.weight" in shapes
    reason = _other(shapes, prefix)
    if reason is None and plus:
        return "MIP-Adapter" if _ends(shapes, f".{GATE}") else "IP-Adapter Plus"
    raise CheckpointError(f"{name}: it is {reason or _no_adapter(shapes)}; {_PUBLIC}")


def _other(shapes: Shapes, prefix: str) -> str | None:
    """What an adapter is that is none of ours; None where nothing tells."""
    if all(_begins(shapes, f"{group}.") for group in ("ref", "redux", "router")):
        return (
            "AnyStory for FLUX, which has a conversion of its own (python -m anystory_core.convert "
            "flux)"
        )
    if _begins(shapes, "image_proj_model.") and _begins(shapes, "adapter_modules."):
        return "MUSE, which lengthens the text's own attention and has no regions for subjects"
    if _begins(shapes, "id_adapter.", "pulid_encoder.", "image_proj.id_embedding_mapping."):
        return "PuLID, which reads faces alone, by a face recogniser"
    if any(re.search(r"(^|\.)(bg_embed|pos_embed)(\.|$)", key) for key in shapes):
        return "StoryMaker, which reads faces by a face recogniser and is a LoRA beside it"
    if _ends(shapes, "_lora.down.weight", "_lora.up.weight") and _begins(shapes, "ip_adapter."):
        return "a FaceID adapter (it carries LoRA tensors)"
    if f"{prefix}perceiver_resampler.proj_in.weight" in shapes:
        return "a FaceID Plus adapter"
    if f"{prefix}proj.0.weight" in shapes or f"{prefix}proj.net.0.proj.weight" in shapes:
        face = shapes.get(f"{prefix}proj.0.weight", (0, 512))[1] == 512
        return "a FaceID adapter" if face else "a full-face adapter"
    if f"{prefix}proj.weight" in shapes or f"{prefix}image_embeds.weight" in shapes:
        return "a plain IP-Adapter (one CLIP vector), not the Plus kind"
    if shapes.get(f"{prefix}proj_in.weight", (0, 0))[1:] == (512,):
        return "InstantID, which reads faces alone, by a face recogniser (512 numbers)"
    return None


def _no_adapter(shapes: Shapes) -> str:
    if any(re.search(r"lora_(down|up|A|B)\b|\.lokr_|\.hada_|\.oft_", key) for key in shapes):
        return "a LoRA, which the host applies to the model"
    if any("input_blocks." in key or "down_blocks." in key for key in shapes):
        return "a checkpoint without an IP-Adapter"
    if any(key.startswith(("encoder.subject.", "projections.clip.")) for key in shapes):
        return "an AnyStory file already; load it as it is"
    return "no IP-Adapter"


def _begins(shapes: Shapes, *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in shapes)


def _ends(shapes: Shapes, *suffixes: str) -> bool:
    return any(key.endswith(suffixes) for key in shapes)
