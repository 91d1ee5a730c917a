"""Where each tensor of an AnyStory file for FLUX comes from in the authors' file and in
FLUX.1-Redux, with its shape, before anything is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...bases.flux.config import FluxTransformerConfig
from ...bases.flux.model import PARTS
from ...bases.flux.names import Sources
from ...bases.flux.sites import build_sites
from ...errors import CheckpointError
from .flux_release import REPORT, Release
from .sources import Source

MixedRanks = Literal["ask", "first", "one"]
MIXED_RANKS: tuple[MixedRanks, ...] = ("ask", "first", "one")
EMBEDDER = "router_embedder."
PROCESSOR = ".attn.processor."
REDUX = ("redux_up.weight", "redux_up.bias", "redux_down.weight", "redux_down.bias")


@dataclass(frozen=True)
class Piece:
    """One tensor of the file to be, and the file that it comes from."""

    origin: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


Pieces = dict[str, Piece]


def _taken(release: Release, tensor: Tensor) -> Piece:
    """A tensor as it is."""
    return Piece(release.name, tuple(tensor.shape), lambda: tensor)


@dataclass(frozen=True)
class Adapter:
    """The low-rank branches of one stream in the authors' file: A and B by diffusers' module."""

    origin: str  # the file's name
    tensors: Mapping[str, Tensor]
    sources: Sources
    rank: int
    bias: bool
    scales: Mapping[str, float]

    @classmethod
    def read(
        cls, release: Release, group: str, sources: Sources, mixed: MixedRanks
    ) -> tuple[Adapter, list[str]]:
        """Check that every branch is whole; also the names that no branch reads."""
        tensors = release.groups[group]
        if group == "router":
            tensors = {
                name: tensor
                for name, tensor in tensors.items()
                if not name.startswith(EMBEDDER) and PROCESSOR not in name
            }
        modules = [module for slices in sources.values() for module in slices]
        keys = {m: [f"transformer.{m}.lora_{x}.weight" for x in "AB"] for m in modules}
        _require(release, group, tensors, [key for pair in keys.values() for key in pair])
        biases = [f"transformer.{m}.lora_B.bias" for m in modules]
        bias = any(key in tensors for key in biases)
        if bias:
            _require(release, group, tensors, biases)
        ranks: dict[str, int] = {}
        for module, (a, b) in keys.items():
            _check_axes(release.name, {key: tensors[key].shape for key in (a, b)})
            if tensors[a].shape[0] != tensors[b].shape[1]:
                raise CheckpointError(
                    f"{release.name}: tensor {b} has shape {tuple(tensors[b].shape)}, expected "
                    f"{tensors[a].shape[0]} columns, the rows of {a}. {REPORT}"
                )
            ranks[module] = tensors[a].shape[0]
        first = next(
            ranks[module]
            for name in tensors
            for module in (name.removeprefix("transformer.").removesuffix(".lora_B.weight"),)
            if module in ranks and name.endswith(".lora_B.weight")
        )
        scales = _scales(release, group, tensors, ranks, first, mixed)
        used = {*biases, *(f"transformer.{m}.alpha" for m in modules)}
        used |= {key for pair in keys.values() for key in pair}
        unknown = [name for name in tensors if name not in used]
        rank = max(ranks.values())
        return cls(release.name, tensors, sources, rank, bias, scales), unknown

    def size(self, module: str) -> tuple[int, int]:
        """Inputs and outputs of a module's branch."""
        a, b = (self.tensors[f"transformer.{module}.lora_{x}.weight"] for x in "AB")
        return a.shape[1], b.shape[0]

    def pieces(self, prefix: str) -> Pieces:
        """Every tensor of the stream. A module of a lower rank is filled with zeros."""
        made: Pieces = {}
        for branch, modules in self.sources.items():
            made[f"{prefix}{branch}.down.weight"] = self._down(modules)
            for place, module in enumerate(modules):
                made[f"{prefix}{branch}.up.{place}.weight"] = self._up(module)
                if self.bias:
                    made[f"{prefix}{branch}.up.{place}.bias"] = self._bias(module)
        return made

    def _down(self, modules: Sequence[str]) -> Piece:
        rows = [self.tensors[f"transformer.{m}.lora_A.weight"] for m in modules]
        inputs = {a.shape[1] for a in rows}

        def make() -> Tensor:
            pad = torch.nn.functional.pad
            return torch.cat([pad(a, (0, 0, 0, self.rank - a.shape[0])) for a in rows])

        # Slices of different inputs do not fit together: a shape that no layer has.
        width = max(inputs) if len(inputs) == 1 else -1
        return Piece(self.origin, (self.rank * len(rows), width), make)

    def _up(self, module: str) -> Piece:
        key = f"transformer.{module}.lora_B.weight"

        def make() -> Tensor:
            b = self._scaled(module, key)
            return torch.nn.functional.pad(b, (0, self.rank - b.shape[1]))

        return Piece(self.origin, (self.tensors[key].shape[0], self.rank), make)

    def _bias(self, module: str) -> Piece:
        key = f"transformer.{module}.lora_B.bias"
        return Piece(self.origin, tuple(self.tensors[key].shape), lambda: self._scaled(module, key))

    def _scaled(self, module: str, key: str) -> Tensor:
        scale = self.scales[module]
        return self.tensors[key] if scale == 1 else self.tensors[key].float() * scale


def map_pieces(release: Release, depths: FluxTransformerConfig) -> tuple[Pieces, set[str]]:
    """The branches of the routing maps, and the names that they read."""
    tensors = release.groups["router"]
    known: dict[str, str] = {}
    for site in build_sites(depths):
        for ours, theirs in (("query", "q"), ("key", "k")):
            start = f"transformer.{site.diffusers}{PROCESSOR}to_{theirs}_routing_map_lora_"
            branch = f"{PARTS['routing_maps']}{site.index}.{ours}"
            known[f"{branch}.down.weight"] = f"{start}A.weight"
            known[f"{branch}.up.0.weight"] = f"{start}B.weight"
            known[f"{branch}.up.0.bias"] = f"{start}B.bias"
    _require(release, "router", tensors, list(known.values()))
    _check_axes(release.name, {key: tensors[key].shape for key in known.values()})
    return {name: _taken(release, tensors[key]) for name, key in known.items()}, set(known.values())


def embedder_pieces(
    release: Release, base: Source, group: str, prefix: str
) -> tuple[Pieces, list[str]]:
    """One Redux embedder: FLUX.1-Redux's layers, or the file's own in their place; also the names
    that it does not read."""
    tensors = release.groups[group]
    if absent := [key for key in REDUX if key not in base.shapes]:
        raise CheckpointError(
            f"{base.name}: tensor {absent[0]} is missing, so it is not FLUX.1-Redux; expected "
            "flux1-redux-dev.safetensors"
        )
    base.check_floats(REDUX)
    known = {"gate.weight": "gate_proj.weight", "gate.bias": "gate_proj.bias"}
    for layer in ("up", "down"):
        known |= {
            f"{layer}_branch.down.weight": f"redux_{layer}_lora_A.weight",
            f"{layer}_branch.up.0.weight": f"redux_{layer}_lora_B.weight",
            f"{layer}_branch.up.0.bias": f"redux_{layer}_lora_B.bias",
        }
    _require(release, group, tensors, [prefix + key for key in known.values()])
    _check_axes(release.name, {key: tensors[prefix + key].shape for key in known.values()})
    _check_axes(base.name, {key: base.shapes[key] for key in REDUX})
    made = {name: _taken(release, tensors[prefix + key]) for name, key in known.items()}
    for key in REDUX:
        if prefix + key in tensors:
            made[key] = _taken(release, tensors[prefix + key])
        else:
            made[key] = Piece(base.name, base.shapes[key], lambda key=key: base.get(key))
    read = {prefix + key for key in (*known.values(), *REDUX)}
    unknown = [name for name in tensors if name not in read]
    return made, [name for name in unknown if group == "redux" or name.startswith(prefix)]


def _scales(
    release: Release, group: str, tensors: Mapping[str, Tensor], ranks: Mapping[str, int],
    first: int, mixed: MixedRanks,
) -> dict[str, float]:  # fmt: skip
    """alpha / rank of every module. diffusers of the authors' days takes the first rank as alpha
    where none is given, later ones each module's own."""
    alphas = [f"transformer.{module}.alpha" for module in ranks]
    if any(key in tensors for key in alphas):
        _require(release, group, tensors, alphas)
        return {
            module: _number(release, key, tensors[key]) / rank
            for (module, rank), key in zip(ranks.items(), alphas, strict=True)
        }
    if len(set(ranks.values())) > 1 and mixed == "ask":
        raise CheckpointError(
            f"{release.name}: the ranks of {group!r} differ ({sorted(set(ranks.values()))}) and no "
            "alpha is given, so the strength of its branches depends on who reads them: diffusers "
            "0.33.1 of the authors' days multiplies each by first rank / own rank, later ones by "
            f"1. Choose mixed_ranks (--mixed-ranks) first (the authors') or one. {REPORT}"
        )
    if mixed == "first":
        return {module: first / rank for module, rank in ranks.items()}
    return dict.fromkeys(ranks, 1.0)


def _require(release: Release, group: str, tensors: Mapping[str, object], keys: list[str]) -> None:
    missing = [key for key in keys if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{release.name}: {len(missing)} of {len(keys)} tensors of {group!r} are missing, such "
            f"as {missing[:3]}; it is another file, or not complete. {REPORT}"
        )


def _check_axes(name: str, shapes: Mapping[str, Sequence[int]]) -> None:
    """CheckpointError unless weights have two axes and biases one."""
    for key, shape in shapes.items():
        axes = 1 if key.endswith("bias") else 2
        if len(shape) != axes or 0 in shape:
            raise CheckpointError(
                f"{name}: tensor {key} has shape {tuple(shape)}, expected {axes} axes. {REPORT}"
            )


def _number(release: Release, key: str, tensor: Tensor) -> float:
    """An alpha: one finite number."""
    if tensor.numel() != 1:
        found = f"has shape {tuple(tensor.shape)}"
    elif not math.isfinite(float(tensor)):
        found = f"is {float(tensor)}"
    else:
        return float(tensor)
    raise CheckpointError(f"{release.name}: {key} {found}, expected one finite number. {REPORT}")
