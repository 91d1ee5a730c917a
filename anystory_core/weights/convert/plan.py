"""Public weights -> an AnyStory file, without training.

    python -m anystory_core.convert --checkpoint sdxl.safetensors \\
        --ip-adapter ip-adapter-plus_sdxl_vit-h.safetensors --out models/anystory/public.safetensors

- subject QFormer and K^ V^ (Eq. 2, 5): those of IP-Adapter Plus;
- ReferenceNet (Eq. 3): the U-Net's own layers, the mask's input channel zero;
- K~ V~ (Eq. 6): the U-Net's own self-attention maps, so that a reference picture is attended to
  the way the picture attends to itself;
- no router: masks, or the labels (:mod:`~...routing.words`), decide where each subject goes.

Tensors are read, changed and written one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...bases.sdxl.config import AnyStoryConfig
from ...bases.sdxl.names import (
    adapter_names,
    diffusers_adapter_names,
    diffusers_modules,
    diffusers_name,
)
from ...bases.sdxl.sites import build_sites
from ...config import QFormerConfig
from ...errors import CheckpointError
from ..checkpoint import FORMAT, read_header
from ..model import PARTS, AnyStoryModel, build_model
from .sources import Adapter, Checkpoint, Source, open_adapter, open_checkpoint
from .write import is_written, write_streaming

REFERENCE_NETS = ("simplified", "original", "none")  # Table 1's two, or IP-Adapter alone
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_FIRST_CONVOLUTION = "input_blocks.0.0.weight"

Progress = Callable[[int, int], None]  # tensors written, tensors in all


@dataclass(frozen=True)
class Converted:
    """What :func:`convert` has written."""

    path: Path
    size: int  # bytes
    parameters: int
    parts: tuple[str, ...]
    notes: tuple[str, ...]  # what the user should know of these sources
    kept: bool  # the file was there already


@dataclass(frozen=True)
class _Piece:
    """Where one tensor comes from: source tensors whose rows follow one another, then
    ``extra_inputs`` zero input channels."""

    source: Source
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    extra_inputs: int = 0

    def make(self) -> Tensor:
        tensors = [self.source.get(key) for key in self.keys]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if self.extra_inputs:
            rows, _, *rest = tensor.shape
            zero = tensor.new_zeros(rows, self.extra_inputs, *rest)
            tensor = torch.cat((tensor, zero), dim=1)
        return tensor

    def check(self) -> None:
        """CheckpointError unless the source tensors give the shape."""
        given = [self.source.shapes[key] for key in self.keys]
        shape = (sum(s[0] for s in given), *given[0][1:]) if given[0] else ()
        if self.extra_inputs and len(shape) > 1:
            shape = (shape[0], shape[1] + self.extra_inputs, *shape[2:])
        if shape != self.shape or len({s[1:] for s in given}) > 1:
            raise CheckpointError(
                f"{self.source.name}: tensor {self.keys[0]} has shape {given[0]}, which does not "
                f"give the expected {self.shape}; it is another model than the expected one"
            )
        self.source.check_floats(self.keys)


def convert(
    checkpoint: str | os.PathLike[str] | None,
    ip_adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    config: AnyStoryConfig | None = None,
    reference_net: str = "simplified",
    dtype: torch.dtype = torch.float16,
    progress: Progress | None = None,
) -> Converted:
    """Write an AnyStory file from an SDXL U-Net and an IP-Adapter Plus file.

    checkpoint: a single ``.safetensors`` or a diffusers folder; None only with ``reference_net``
    "none". config: sizes of the base (SDXL when None); the QFormer's own sizes are the file's.
    reference_net: "simplified" (the paper's: no cross-attention), "original" (with it; the label's
    text is then encoded with each subject), or "none". A file that was made from the same sources
    (by their hashes) in the same way is kept, another converted one is replaced. CheckpointError
    names what a file is instead of what was expected, or that ``out`` is there and no converted
    file; nothing is left behind then.
    """
    out = Path(out)
    if reference_net not in REFERENCE_NETS:
        raise CheckpointError(
            f"reference_net: got {reference_net!r}, expected one of {list(REFERENCE_NETS)}"
        )
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out.name}: expected a name that ends in .safetensors")
    base = config or AnyStoryConfig.sdxl()
    with contextlib.ExitStack() as stack:
        adapter = open_adapter(Path(ip_adapter), base)
        stack.enter_context(adapter.source)
        unet = None
        if reference_net != "none":
            if checkpoint is None:
                raise CheckpointError(
                    f"reference_net {reference_net!r}: needs a checkpoint; give one, or choose "
                    "'none' for IP-Adapter alone"
                )
            unet = open_checkpoint(Path(checkpoint), base)
            stack.enter_context(unet.source)
        sources = [adapter.source] + ([unet.source] if unet else [])
        if any(out.resolve() == f.resolve() for source in sources for f in source.files):
            raise CheckpointError(f"{out.name}: is one of the sources; choose another name")
        _check_replaceable(out)
        made = {"subject_encoder", "clip_projections"}
        if unet is not None:
            made |= {"reference_net", "reference_projections"}
        parts = tuple(part for part in PARTS if part in made)
        full = dataclasses.replace(
            base,
            subject_qformer=_qformer(adapter, base),
            reference=dataclasses.replace(
                base.reference, cross_attention=reference_net == "original"
            ),
        )
        pieces = _plan(full, parts, adapter, unet)
        shapes = {name: piece.shape for name, piece in pieces.items()}
        metadata = {
            "anystory.format": FORMAT,
            "anystory.config": full.to_json(),
            "anystory.source.ip_adapter": adapter.source.describe(),
        }
        if unet is not None:
            metadata["anystory.source.checkpoint"] = unet.source.describe()
        kept = is_written(out, shapes, dtype=dtype, metadata=metadata)
        if not kept:
            make = _Maker(pieces, progress)
            write_streaming(out, shapes, make, dtype=dtype, metadata=metadata)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    notes = unet.notes if unet else ()
    return Converted(out, out.stat().st_size, parameters, parts, notes, kept)


def _check_replaceable(out: Path) -> None:
    """CheckpointError unless nothing is lost with ``out``: it is not there, or a converted file
    that holds no trained part."""
    if not out.exists():
        return
    try:
        keys = read_header(out).metadata.keys()
    except CheckpointError:
        keys = set[str]()
    converted = any(key.startswith("anystory.source.") for key in keys)
    if not converted or any(key.endswith("_steps") for key in keys):
        raise CheckpointError(
            f"{out.name}: is there already, and was not made by conversion alone; choose another "
            "name, or move that file away"
        )


def with_ip_adapter_sizes(base: AnyStoryConfig, path: str | os.PathLike[str]) -> AnyStoryConfig:
    """``base`` with an IP-Adapter Plus file's QFormer. CheckpointError as in :func:`convert`."""
    adapter = open_adapter(Path(path), base)
    with adapter.source:
        return dataclasses.replace(base, subject_qformer=_qformer(adapter, base))


def load_ip_adapter(model: AnyStoryModel, path: str | os.PathLike[str]) -> None:
    """Start a model of an IP-Adapter Plus file's sizes from its QFormer and K and V maps, for
    training. CheckpointError as in :func:`convert`; the model is then unchanged."""
    adapter = open_adapter(Path(path), model.config)
    with adapter.source:
        pieces = _plan(model.config, ("subject_encoder", "clip_projections"), adapter, None)
        ready = {name: piece.make() for name, piece in pieces.items()}
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in ready.items():
            state[name].copy_(tensor)


class _Maker:
    """Makes each tensor when the writer asks for it, and reports progress."""

    def __init__(self, pieces: Mapping[str, _Piece], progress: Progress | None) -> None:
        self.pieces = pieces
        self.progress = progress
        self.done = 0

    def __call__(self, name: str) -> Tensor:
        tensor = self.pieces[name].make()
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, len(self.pieces))
        return tensor


def _qformer(adapter: Adapter, base: AnyStoryConfig) -> QFormerConfig:
    """The QFormer's sizes as its tensors tell them; the head width is the base's (64)."""
    shapes = adapter.source.shapes
    names = diffusers_adapter_names if adapter.diffusers else adapter_names

    def rows(ours: str) -> int:
        keys = names(ours, None)
        missing = [key for key in keys if key not in shapes]
        if missing:
            raise CheckpointError(
                f"{adapter.source.name}: tensor {missing[0]} is missing; get the file again"
            )
        return sum(shapes[key][0] for key in keys)

    (latents,) = names("latents", None)
    _, queries, width = shapes[latents]
    layers = 0
    while names(f"layers.{layers}.0.to_q.weight", None)[0] in shapes:
        layers += 1
    if layers == 0:
        rows("layers.0.0.to_q.weight")
    head_dim = base.subject_qformer.head_dim
    return QFormerConfig(
        queries=queries,
        width=width,
        layers=layers,
        heads=rows("layers.0.0.to_q.weight") // head_dim,
        head_dim=head_dim,
        ff_mult=rows("layers.0.1.1.weight") // width,
        output_dim=rows("proj_out.weight"),
    )


def _plan(
    config: AnyStoryConfig,
    parts: Sequence[str],
    adapter: Adapter,
    unet: Checkpoint | None,
) -> dict[str, _Piece]:
    """Every tensor of the model to be, with its source; all shapes checked."""
    sites = {site.index: site for site in build_sites(config.unet)}
    modules = diffusers_modules(config.unet)
    adapter_name = diffusers_adapter_names if adapter.diffusers else adapter_names

    def of_unet(ldm: str) -> tuple[Source, tuple[str, ...]]:
        assert unet is not None  # only parts that need it name its tensors
        name = diffusers_name(modules, ldm) if unet.diffusers else ldm
        return unet.source, (unet.prefix + name,)

    def origin(name: str) -> tuple[Source, tuple[str, ...]]:
        part, rest = name.split(".", 1)
        if part == "encoder":
            return adapter.source, adapter_name(rest.removeprefix("subject."), None)
        if part == "reference_net":
            return of_unet(rest)
        kind, index, leaf = rest.split(".", 2)  # projections.clip.7.to_k.weight
        site = sites[int(index)]
        if kind == "clip":
            return adapter.source, adapter_name(leaf, site)
        return of_unet(f"{site.ldm}.attn1.{leaf}")

    with torch.device("meta"):
        state = build_model(config, parts, device="meta").state_dict()
    pieces: dict[str, _Piece] = {}
    missing: dict[str, list[str]] = {}
    for name, tensor in state.items():
        source, keys = origin(name)
        absent = [key for key in keys if key not in source.shapes]
        if absent:
            missing.setdefault(source.name, []).extend(absent)
            continue
        extra = 1 if name == f"reference_net.{_FIRST_CONVOLUTION}" else 0
        pieces[name] = _Piece(source, keys, tuple(tensor.shape), extra)
    for file, keys in missing.items():
        raise CheckpointError(
            f"{file}: {len(keys)} tensors of {config.name} are missing, such as {keys[0]}; it is "
            f"another model (a distilled one has fewer blocks), or not complete"
        )
    for piece in pieces.values():
        piece.check()
    return pieces
