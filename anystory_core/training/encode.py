"""Text states and target latents of all samples of a run, ahead of its training, in shards.

RUN.toml is the run's own file: its base, its data and its data.cache, where the shards go and where
training finds them. Captions and targets are encoded as that run will need them (data.resolution,
data.mirror, run.precision), every view of a group as a target.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from ..data.commands.options import add_machines, say
from ..data.convert import DAMAGED, LeftOut, Machines, Made, units_of
from ..data.convert import run as convert
from ..data.edit import device
from ..data.index import Entry, Index
from ..data.manifest import Step
from ..data.parts import views_of_group
from ..data.schema import decode
from ..errors import AnyStoryError, ConfigError
from .augment import centre_crop
from .cache import Encodings, digest_of, pixels_name, text_name
from .config import TrainingConfig, load_config
from .hosts.frozen import load_frozen
from .packed import PACKED, SUFFIX
from .shapes import Shape, bucket_shapes, nearest

_PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Encode:
    """Entries -> their encodings, each once a shard."""

    config: TrainingConfig
    batch: int

    @cached_property
    def encodings(self) -> Encodings:
        frozen = load_frozen(self.config.base)
        return Encodings(frozen.to(device(), _PRECISIONS[self.config.run.precision]), self.config)

    def samples(self, items: Sequence[Entry]) -> Iterator[Made]:
        done: set[str] = set()
        for start in range(0, len(items), self.batch):
            captions: dict[str, str] = {}
            targets: dict[str, Tensor] = {}
            for entry in items[start : start + self.batch]:
                try:
                    for caption, target in self._wanted(entry):
                        captions.setdefault(digest_of(text_name(caption)), caption)
                        targets.setdefault(digest_of(pixels_name("latents", target)), target)
                except AnyStoryError as error:
                    yield LeftOut(entry.name, DAMAGED, str(error))
            made = {**self._texts(captions, done), **self._latents(targets, done)}
            done |= set(made)
            for key, tensors in made.items():
                kept = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
                yield key, {SUFFIX: cast(Any, safetensors.torch).save(kept)}

    def _wanted(self, entry: Entry) -> Iterator[tuple[str, Tensor]]:
        """(caption, target (3,H,W) in [-1,1]) of all that a run may draw from a sample."""
        views = views_of_group(entry.files)
        drawn = [(views[i - 1], view) for i, view in enumerate(views)] or [None]
        for pair in drawn:
            raw = decode(entry, pair)
            target, _, _ = centre_crop(raw.target, raw.masks, self._shape(raw.target))
            yield raw.caption, target
            if self.config.data.mirror:
                yield raw.caption, target.flip(-1)

    def _shape(self, target: Tensor) -> Shape:
        """What a run crops a target (H,W,3) to. In buckets, pictures of a shape that few have are
        cropped to another one; these a run encodes itself."""
        side = self.config.data.resolution
        if self.config.data.shapes == "square":
            return side, side
        shapes = bucket_shapes(side)
        return shapes[nearest((target.shape[0], target.shape[1]), shapes)]

    def _texts(self, captions: dict[str, str], done: set[str]) -> dict[str, dict[str, Tensor]]:
        new = {key: caption for key, caption in captions.items() if key not in done}
        if not new:
            return {}
        states, pooled = self.encodings.frozen.text(list(new.values()))
        return {
            key: {"states": s, "pooled": p} for key, s, p in zip(new, states, pooled, strict=True)
        }

    def _latents(self, targets: dict[str, Tensor], done: set[str]) -> dict[str, dict[str, Tensor]]:
        new = {key: target for key, target in targets.items() if key not in done}
        if not new:
            return {}
        made: dict[str, dict[str, Tensor]] = {}
        for shape in {target.shape for target in new.values()}:
            same = {key: target for key, target in new.items() if target.shape == shape}
            pixels = torch.stack(list(same.values())).to(device())
            latents = self.encodings.frozen.encode_picture(pixels)
            made |= {key: {"latents": x} for key, x in zip(same, latents, strict=True)}
        return made


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the run's TOML file")
    parser.add_argument(
        "--batch", type=int, default=8, help="samples at once; default: %(default)s"
    )
    parser.add_argument("--per-shard", type=int, default=500, help="samples; default: %(default)s")
    add_machines(parser, workers=1)


def run(options: argparse.Namespace) -> int:
    config = load_config(options.run)
    if not config.data.cache:
        raise ConfigError(f"{options.run}: data.cache is not set; name the folder of the encodings")
    encode = Encode(config, options.batch)
    folder = encode.encodings.folder  # by the fingerprint of the networks
    assert folder is not None
    if options.workers > 1 or options.ray:
        encode = Encode(config, options.batch)  # each process loads them for itself
    given = [origin.path for origin in config.data.origins]
    items = list(Index.of(given))
    data = config.data
    settings = {"resolution": data.resolution, "shapes": data.shapes, "mirror": data.mirror}
    step = Step("encode", {"data": given}, settings, len(items))
    machines = Machines(options.workers, options.ray)
    out = str(folder / PACKED)
    total = convert(step, encode, units_of(items, options.per_shard), out, machines)
    return say(total, out)
