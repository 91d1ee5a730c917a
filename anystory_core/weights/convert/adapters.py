"""Public adapters that become AnyStory's CLIP branch: their tensors' names, their sizes, and what
must be known of their training.

- *IP-Adapter Plus*: ``image_proj.*`` and ``ip_adapter.N.to_k_ip.weight``; diffusers, which stores
  one inside its U-Net, says ``encoder_hid_proj.image_projection_layers.0.*`` and
  ``down_blocks...attn2.processor.to_k_ip.0.weight``.
- *MIP-Adapter* (https://github.com/hqhQAQ/MIP-Adapter, ``model_sdxl_plus.bin``): the same, trained
  further on pictures of two subjects, and a gate at every block, ``ip_adapter.N.text_to_weight``.
- *MS-Diffusion* (https://github.com/MS-Diffusion/MS-Diffusion, ``ms_adapter.bin``): queries made of
  a phrase and a box, ``ms_adapter.N.to_k_ip.weight``. Its ``dummy_image_tokens`` were never trained
  and cannot reach the output, so they are left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...bases.sdxl.config import AnyStoryConfig
from ...bases.sdxl.sites import UNetSite
from ...config import ClipBranchConfig, ClipVisionConfig, GroundingConfig, QFormerConfig
from ...errors import CheckpointError
from .kinds import GATE, INSIDE, Kind, recognise
from .sources import Source
from .unets import TEXT_WIDTHS

# The public "plus-face" file has the very tensor names and shapes of the general one.
_FACE_FILES = {"677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1"}
BIG_G = ClipVisionConfig(width=1664, layers=48, heads=16, intermediate=8192, projection_dim=1280)
# How each kind was trained, where that is not as the paper's: pictures, and the usual strength.
_MIP = ClipBranchConfig(gate=True, outside="white", strength=0.65)
_MS = ClipBranchConfig(
    grounding=GroundingConfig(), background=False, fit="stretch", outside="black", strength=0.6
)

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
    ``layers.0.0.to_q.weight`` ...), or of a block's ``to_k.weight`` or ``gate.weight``."""
    if site is None:
        return (f"image_proj.{ours}",)
    return (f"ip_adapter.{site.ip_adapter}.{_ip(ours, '')}",)


def diffusers_adapter_names(ours: str, site: UNetSite | None) -> tuple[str, ...]:
    """As :func:`adapter_names` in a diffusers U-Net. Two names: their rows follow one another."""
    if site is not None:
        return (f"{site.diffusers}.attn2.processor.{_ip(ours, '.0')}",)
    match = _LAYER.fullmatch(ours)
    if match is None:
        return (INSIDE + ours,)
    layer, half, rest = match.groups()
    member, _, leaf = f"{half}.{rest}".rpartition(".")
    if member == "0.to_kv":
        return tuple(f"{INSIDE}layers.{layer}.attn.{m}.{leaf}" for m in ("to_k", "to_v"))
    return (f"{INSIDE}layers.{layer}.{_LAYER_MEMBERS[member]}.{leaf}",)


def ms_diffusion_names(ours: str, site: UNetSite | None) -> tuple[str, ...]:
    """As :func:`adapter_names` in MS-Diffusion's file."""
    if site is not None:
        return (f"ms_adapter.{site.ip_adapter}.{_ip(ours, '')}",)
    return (f"image_proj.{'grounding_latents' if ours == 'latents' else ours}",)


def _ip(ours: str, index: str) -> str:
    """``to_k.weight`` -> ``to_k_ip.weight``, with diffusers' adapter number in between; the gate
    has a name of its own."""
    member, leaf = ours.split(".")
    if member == "gate":
        return GATE
    return f"{member}_ip{index}.{leaf}"


@dataclass(frozen=True)
class Adapter:
    """An adapter in a public file. ``inside``: stored in a U-Net, with diffusers' names."""

    source: Source
    kind: Kind
    inside: bool = False

    def keys(self, ours: str, site: UNetSite | None) -> tuple[str, ...]:
        """Names in the file of one of our tensors, as :func:`adapter_names` takes it."""
        if self.kind == "MS-Diffusion":
            return ms_diffusion_names(ours, site)
        return (diffusers_adapter_names if self.inside else adapter_names)(ours, site)

    def config(self, base: AnyStoryConfig, *, gate: bool = True) -> AnyStoryConfig:
        """``base`` with this adapter as its CLIP branch. ``gate``: with the gate that the file may
        have. CheckpointError: a tensor is missing that tells a size."""
        clip = base.clip
        branch = ClipBranchConfig()
        if self.kind == "MIP-Adapter":
            branch = dataclasses.replace(_MIP, gate=gate)
        if self.kind == "MS-Diffusion":
            branch = dataclasses.replace(_MS, grounding=self._grounding())
            if self._shape("proj_in.weight")[1] == BIG_G.width:
                clip = BIG_G
        return dataclasses.replace(
            base,
            clip=clip,
            clip_branch=branch,
            subject_qformer=self._qformer(base.subject_qformer.head_dim),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user of this kind should know."""
        name = self.source.name
        if self.kind == "MIP-Adapter":
            return (f"{name} is MIP-Adapter; strength 1 is the 0.65 of its authors.",)
        if self.kind == "MS-Diffusion":
            return (
                f"{name} is MS-Diffusion; strength 1 is the 0.6 of its authors (0.67 for scenes). "
                "Load CLIP ViT-bigG as clip_vision, connect the prompt's clip to Encode Subject "
                "and give every subject a label.",
            )
        return ()

    def check_face(self, read: Callable[[int], None] | None = None) -> None:
        """CheckpointError when it is the plus-face file, which only its hash tells; ``read`` as in
        :meth:`.sources.Source.describe`."""
        if any(self.source.digest(path, read) in _FACE_FILES for path in self.source.files):
            _refuse_face(self.source.name)

    def _shape(self, ours: str) -> tuple[int, ...]:
        """Of one of our tensors."""
        keys, shapes = self.keys(ours, None), self.source.shapes
        missing = [key for key in keys if key not in shapes]
        if missing:
            raise CheckpointError(
                f"{self.source.name}: tensor {missing[0]} is missing; get the file again"
            )
        return (sum(shapes[key][0] for key in keys), *shapes[keys[0]][1:])

    def _qformer(self, head_dim: int) -> QFormerConfig:
        """The QFormer's sizes as its tensors tell them, all but the width of a head."""
        _, queries, width = self._shape("latents")
        layers = 0
        while self.keys(f"layers.{layers}.0.to_q.weight", None)[0] in self.source.shapes:
            layers += 1
        return QFormerConfig(
            queries=queries,
            width=width,
            layers=max(1, layers),
            heads=self._shape("layers.0.0.to_q.weight")[0] // head_dim,
            head_dim=head_dim,
            ff_mult=self._shape("layers.0.1.1.weight")[0] // width,
            output_dim=self._shape("proj_out.weight")[0],
        )

    def _grounding(self) -> GroundingConfig:
        """A phrase and a box together, of which the box has 8 numbers for each frequency."""
        grounding = GroundingConfig()
        inputs = self._shape("latent_proj.0.weight")[1]
        return dataclasses.replace(grounding, phrase_dim=inputs - grounding.box_dim)


def open_adapter(path: Path, config: AnyStoryConfig) -> Adapter:
    """An adapter for the base of ``config``, from a ``.safetensors`` or a file of ``torch.save``.

    CheckpointError: another kind (plain, face) or base of adapter, or none at all. The plus-face
    kind is known by its name here, and by its hash in :meth:`Adapter.check_face`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.name}: no such file; give an adapter such as IP-Adapter Plus")
    if re.search(r"plus[-_ ]?face", path.name, re.IGNORECASE):
        _refuse_face(path.name)
    source = Source.open([path], path.name, pickles=True)
    try:
        kind = recognise(source.name, source.shapes)
        adapter = Adapter(source, kind, any(key.startswith(INSIDE) for key in source.shapes))
        _check_base(adapter, config)
        return adapter
    except BaseException:
        source.close()
        raise


def _check_base(adapter: Adapter, config: AnyStoryConfig) -> None:
    """CheckpointError unless the adapter is for this base and its picture encoder."""
    shapes, name = adapter.source.shapes, adapter.source.name
    (width_key,), (text_key,) = (
        adapter.keys(key, None) for key in ("proj_in.weight", "proj_out.weight")
    )
    for key in (width_key, text_key):
        if key not in shapes:
            raise CheckpointError(f"{name}: tensor {key} is missing; get the file again")
    width, text = shapes[width_key][1], shapes[text_key][0]
    if text != config.unet.context_dim:
        raise CheckpointError(
            f"{name}: it is {adapter.kind} for {TEXT_WIDTHS.get(text, 'another base')} (text "
            f"states of width {text}), expected {config.name} ({config.unet.context_dim}); the "
            "public one is ip-adapter-plus_sdxl_vit-h.safetensors"
        )
    known = (
        {config.clip.width, BIG_G.width} if adapter.kind == "MS-Diffusion" else {config.clip.width}
    )
    if width not in known:
        raise CheckpointError(
            f"{name}: it reads picture states of width {width}, expected {config.clip.width} (CLIP "
            "ViT-H); Kolors' adapters read 1024; the public one is "
            "ip-adapter-plus_sdxl_vit-h.safetensors"
        )


def _refuse_face(name: str) -> None:
    raise CheckpointError(
        f"{name}: it is the 'plus-face' kind, trained on cropped faces only: it forgets clothes "
        "and things; give the general ip-adapter-plus_sdxl_vit-h.safetensors"
    )
