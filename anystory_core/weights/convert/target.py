"""The file that a conversion makes: whether it may be written, whether it is made already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import CheckpointError
from ..checkpoint import FORMAT, read_metadata
from .sources import Source
from .write import is_written, write_streaming

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SOURCE = "anystory.source."  # of the header's entries that name what a file was made from

Progress = Callable[[int, int], None]  # bytes read for checksums and written, and in all


@dataclass(frozen=True)
class Converted:
    """What a conversion has written."""

    path: Path
    size: int  # bytes
    parameters: int
    parts: tuple[str, ...]
    notes: tuple[str, ...]  # what the user should know of these sources
    kept: bool  # the file was there already


class Makes(Protocol):
    """A tensor of the file to be, which is made when it is written from the file ``origin``."""

    @property
    def origin(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def make(self) -> Tensor: ...


@dataclass
class Meter:
    """Tells ``progress`` how far a conversion is; what that raises ends it."""

    progress: Progress | None
    total: int  # bytes
    done: int = 0

    @classmethod
    def of(
        cls,
        pieces: Mapping[str, Makes],
        dtype: torch.dtype,
        sources: Iterable[Source],
        progress: Progress | None,
    ) -> Meter:
        """All sources are read once for their checksums, and all tensors written."""
        written = sum(torch.Size(p.shape).numel() * dtype.itemsize for p in pieces.values())
        return cls(progress, written + sum(source.size for source in sources))

    def add(self, count: int) -> None:
        """``count`` bytes more are done."""
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


def check_target(out: Path, sources: Iterable[Path]) -> None:
    """CheckpointError unless ``out`` has a name that fits, is no source, and nothing is lost with
    it: it is not there, or a converted file that holds no trained part."""
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out.name}: expected a name that ends in .safetensors")
    if any(out.resolve() == source.resolve() for source in sources):
        raise CheckpointError(f"{out.name}: is one of the sources; choose another name")
    if not out.exists():
        return
    try:
        keys = read_metadata(out).keys()
    except CheckpointError:
        keys = set[str]()
    converted = any(key.startswith(SOURCE) for key in keys)
    if not converted or any(key.endswith("_steps") for key in keys):
        raise CheckpointError(
            f"{out.name}: is there already, and was not made by conversion alone; choose another "
            "name, or move that file away"
        )


def make_target(
    out: Path,
    pieces: Mapping[str, Makes],
    *,
    config: str,
    sources: Mapping[str, str],
    dtype: torch.dtype,
    parts: Sequence[str],
    notes: Sequence[str] = (),
    meter: Meter | None = None,
) -> Converted:
    """Write the tensors one by one, unless the file was made from the same in the same way.

    config: JSON for the header; sources: what the header says of them, by kind. CheckpointError as
    in :func:`.write.write_streaming`.
    """
    shapes = {name: piece.shape for name, piece in pieces.items()}
    metadata = {"anystory.format": FORMAT, "anystory.config": config}
    metadata |= {SOURCE + kind: text for kind, text in sources.items()}
    kept = is_written(out, shapes, dtype=dtype, metadata=metadata)
    if not kept:

        def make(name: str) -> Tensor:
            tensor = pieces[name].make()
            if meter is not None:
                meter.add(tensor.numel() * dtype.itemsize)
            return tensor

        write_streaming(
            out, shapes, make, dtype=dtype, metadata=metadata, origin=lambda n: pieces[n].origin
        )
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Converted(out, out.stat().st_size, parameters, tuple(parts), tuple(notes), kept)
