"""The authors' file for FLUX and FLUX.1-Redux -> one AnyStory file.

    python -m anystory_core.convert flux anystory_flux.bin flux1-redux-dev.safetensors \\
        models/anystory/anystory_flux.safetensors

Every tensor of the file to be has a known name in the sources. One that is missing is an error:
the authors' code would go on with random numbers. Unknown ones are left out, with a note. Ranks,
biases, scales and the number type are the sources'. Tensors are read, changed and written one by
one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...bases.flux.config import (
    BranchConfig,
    FluxConfig,
    FluxTransformerConfig,
    ReduxConfig,
    SiglipConfig,
)
from ...bases.flux.model import PARTS, build_model
from ...bases.flux.names import reference_sources, router_sources
from ...errors import CheckpointError, ConfigError
from ...tensor_files import FLOATS
from ..fingerprint import file_sha256
from .flux_pieces import (
    EMBEDDER,
    MIXED_RANKS,
    PROCESSOR,
    REDUX,
    Adapter,
    MixedRanks,
    Pieces,
    embedder_pieces,
    map_pieces,
)
from .flux_release import REPORT, Release, open_release
from .sources import Source
from .target import DTYPES, Converted, Meter, Progress, check_target, make_target

_HEAD_DIM = 128  # of FLUX.1; no tensor of the file tells it


def convert_flux(
    anystory: str | os.PathLike[str],
    redux: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    mixed_ranks: MixedRanks = "ask",
    head_dim: int = _HEAD_DIM,
    progress: Progress | None = None,
) -> Converted:
    """Write an AnyStory file for FLUX.

    anystory: the authors' ``.bin``; redux: FLUX.1-Redux as ``.safetensors``. dtype: None keeps the
    sources' (the wider one where they differ). mixed_ranks: what a branch is multiplied with where
    ranks differ and no alpha is given, "first": first rank / own rank, as in the authors' days;
    "one": 1; "ask": an error with the question. A file that was made from the same sources in the
    same way is kept. CheckpointError says what is wrong; nothing is left behind then.
    """
    if mixed_ranks not in MIXED_RANKS:
        raise CheckpointError(
            f"mixed_ranks: got {mixed_ranks!r}, expected one of {list(MIXED_RANKS)}"
        )
    out = Path(out)
    check_target(out, [Path(anystory), Path(redux)])
    release = open_release(Path(anystory))
    with Source.open([Path(redux)], Path(redux).name) as base:
        plan = _Plan.of(release, base, mixed_ranks, head_dim)
        number_type = dtype or plan.dtype
        meter = Meter.of(plan.pieces, number_type, [base], progress)
        meter.total += release.path.stat().st_size
        return make_target(
            out,
            plan.pieces,
            config=plan.config.to_json(),
            sources={
                "anystory": f"{release.name} sha256:{file_sha256(release.path, meter.add)}",
                "redux": base.describe(meter.add),
                "mixed_ranks": mixed_ranks,
            },
            dtype=number_type,
            parts=tuple(PARTS),
            notes=plan.notes,
            meter=meter,
        )


@dataclass(frozen=True)
class _Plan:
    """Every tensor of the file to be: its shape, and how it is made."""

    config: FluxConfig
    pieces: Pieces
    dtype: torch.dtype
    notes: tuple[str, ...]

    @classmethod
    def of(cls, release: Release, base: Source, mixed: MixedRanks, head_dim: int) -> _Plan:
        depths = _depths(release)
        reference, unknown_ref = Adapter.read(release, "ref", reference_sources(depths), mixed)
        router, unknown = Adapter.read(release, "router", router_sources(depths), mixed)
        pieces = reference.pieces(PARTS["reference_branches"])
        pieces |= router.pieces(PARTS["router_branches"])
        maps, known = map_pieces(release, depths)
        pieces |= maps
        own, unknown_redux = embedder_pieces(release, base, "redux", "")
        pieces |= {PARTS["subject_redux"] + name: piece for name, piece in own.items()}
        own, unknown_embedder = embedder_pieces(release, base, "router", EMBEDDER)
        pieces |= {PARTS["routing_redux"] + name: piece for name, piece in own.items()}
        config = _config(release, base, reference, router, depths, head_dim)
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in build_model(config, device="meta").state_dict().items()
        }
        _check_shapes(release, shapes, pieces)
        strange = [
            *(f"ref: {name}" for name in unknown_ref),
            *(f"router: {name}" for name in unknown),
            *(f"redux: {name}" for name in unknown_redux),
            *(f"router: {name}" for name in unknown_embedder),
            *(
                f"router: {name}"
                for name in release.groups["router"]
                if PROCESSOR in name and name not in known
            ),
        ]
        notes = list(release.notes)
        if strange:
            notes.append(
                f"{release.name}: {len(strange)} tensors that the authors' code never uses are "
                f"left out, such as {strange[:3]}. {REPORT}."
            )
        dtypes = {tensor.dtype for group in release.groups.values() for tensor in group.values()}
        dtypes |= {FLOATS[base.dtypes[key]] for key in REDUX}
        dtype = functools.reduce(torch.promote_types, dtypes)
        if dtype not in DTYPES.values():
            dtype = torch.float32
        return cls(config, {name: pieces[name] for name in shapes}, dtype, tuple(notes))


def _depths(release: Release) -> FluxTransformerConfig:
    """The number of blocks, from the highest one that is named."""
    counts: dict[str, int] = {"transformer_blocks": 0, "single_transformer_blocks": 0}
    for name in release.groups["ref"]:
        parts = name.split(".")
        if len(parts) > 2 and parts[1] in counts and parts[2].isdecimal():
            counts[parts[1]] = max(counts[parts[1]], int(parts[2][:6]) + 1)
    try:
        return FluxTransformerConfig(
            double_blocks=counts["transformer_blocks"],
            single_blocks=counts["single_transformer_blocks"],
        )
    except ConfigError as error:
        raise CheckpointError(f"{release.name}: {error}; it is another file") from error


def _config(
    release: Release, base: Source, reference: Adapter, router: Adapter,
    depths: FluxTransformerConfig, head_dim: int,
) -> FluxConfig:  # fmt: skip
    """All sizes, from the shapes of tensors."""
    token, width = reference.size("x_embedder")
    context, _ = router.size("context_embedder")
    mlp, _ = reference.size("transformer_blocks.0.ff.net.2")
    patch = FluxTransformerConfig().patch_size
    hidden, vision = base.shapes["redux_up.weight"]
    groups = release.groups
    processor = f"transformer.transformer_blocks.0{PROCESSOR}to_q_routing_map_lora_A.weight"
    try:
        return FluxConfig(
            transformer=FluxTransformerConfig(
                width=width,
                heads=width // head_dim,
                double_blocks=depths.double_blocks,
                single_blocks=depths.single_blocks,
                context_dim=context,
                channels=token // patch**2,
                mlp_ratio=mlp // max(1, width),
            ),
            vision=SiglipConfig(width=vision),
            redux=ReduxConfig(
                hidden_ratio=hidden // max(1, context),
                rank=groups["redux"]["redux_up_lora_A.weight"].shape[0],
            ),
            branches=BranchConfig(
                reference_rank=reference.rank,
                reference_bias=reference.bias,
                router_rank=router.rank,
                router_bias=router.bias,
                routing_map_rank=groups["router"][processor].shape[0],
            ),
        )
    except ConfigError as error:
        raise CheckpointError(f"{release.name}: {error}; its shapes are not FLUX.1's") from error


def _check_shapes(release: Release, shapes: Mapping[str, tuple[int, ...]], pieces: Pieces) -> None:
    """CheckpointError unless every piece has the shape of its tensor."""
    for name, shape in shapes.items():
        if pieces[name].shape != shape:
            raise CheckpointError(
                f"{release.name}: what makes {name} has shape {pieces[name].shape}, expected "
                f"{shape}; the file is another one, or FLUX.1-Redux has another width. {REPORT}"
            )
