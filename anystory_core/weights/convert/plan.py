"""The plan of a conversion: where every tensor of the file to be comes from, checked by names and
shapes before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...bases.sdxl.config import AnyStoryConfig
from ...bases.sdxl.sites import build_sites
from ...errors import CheckpointError
from ..model import build_model
from .adapters import Adapter
from .sources import Source
from .unets import PublicUNet

_FIRST_CONVOLUTION = "input_blocks.0.0.weight"


@dataclass(frozen=True)
class Piece:
    """Where one tensor comes from: source tensors whose rows follow one another, then
    ``extra_inputs`` zero input channels."""

    source: Source
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    extra_inputs: int = 0

    @property
    def origin(self) -> str:
        """The file that its first rows come from."""
        return self.source.owner[self.keys[0]].name

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


def plan_tensors(
    config: AnyStoryConfig,
    parts: Sequence[str],
    adapter: Adapter,
    unet: PublicUNet | None,
) -> dict[str, Piece]:
    """Every tensor of a model of these parts, with its source. CheckpointError: a tensor is
    missing, has another shape, or is quantised."""
    sites = {site.index: site for site in build_sites(config.unet)}

    def of_unet(ldm: str) -> tuple[Source, tuple[str, ...]]:
        assert unet is not None  # only parts that need it name its tensors
        return unet.source, (unet.key(ldm),)

    def origin(name: str) -> tuple[Source, tuple[str, ...]]:
        part, rest = name.split(".", 1)
        if part == "encoder":
            return adapter.source, adapter.keys(rest.removeprefix("subject."), None)
        if part == "reference_net":
            return of_unet(rest)
        kind, index, leaf = rest.split(".", 2)  # projections.clip.7.to_k.weight
        site = sites[int(index)]
        if kind == "clip":
            return adapter.source, adapter.keys(leaf, site)
        return of_unet(f"{site.ldm}.attn1.{leaf}")

    with torch.device("meta"):
        state = build_model(config, parts, device="meta").state_dict()
    pieces: dict[str, Piece] = {}
    missing: dict[str, list[str]] = {}
    for name, tensor in state.items():
        source, keys = origin(name)
        absent = [key for key in keys if key not in source.shapes]
        if absent:
            missing.setdefault(source.name, []).extend(absent)
            continue
        extra = 1 if name == f"reference_net.{_FIRST_CONVOLUTION}" else 0
        pieces[name] = Piece(source, keys, tuple(tensor.shape), extra)
    for file, keys in missing.items():
        raise CheckpointError(
            f"{file}: {len(keys)} tensors of {config.name} are missing, such as {keys[0]}; it is "
            f"another model (a distilled one has fewer blocks), or not complete"
        )
    for piece in pieces.values():
        piece.check()
    return pieces
