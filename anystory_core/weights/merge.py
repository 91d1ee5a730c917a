"""Files of different parts joined into one, such as those of both stages of training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..bases.sdxl.config import AnyStoryConfig
from ..errors import CheckpointError
from ..tensor_files import open_tensors
from .checkpoint import read_header, save_model


def merge_files(
    paths: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Join files of one configuration that hold different parts (stage 1 and stage 2). What the
    configuration says of routers counts where a file holds them. ``dtype`` None keeps each
    tensor's own."""
    merged: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    owner: dict[str, str] = {}
    config: AnyStoryConfig | None = None
    for path in map(Path, paths):
        header = read_header(path)
        given = header.config
        if config is not None:
            if "routers" in header.parts:
                config = dataclasses.replace(config, router=given.router)
            else:
                given = dataclasses.replace(given, router=config.router)
            if given != config:
                raise CheckpointError(
                    f"{path.name}: its configuration differs from the first file's; only files of "
                    "one model can be merged"
                )
        config = given
        for part in header.parts:
            if part in owner:
                raise CheckpointError(f"{path.name}: {part} is also in {owner[part]}")
            owner[part] = path.name
        metadata.update(header.metadata)
        with open_tensors(path) as file:
            merged.update({name: file.get_tensor(name) for name in header.shapes})
    if config is None:
        raise CheckpointError("merge: got no files, expected at least one")
    save_model(out, merged, config, metadata=metadata, dtype=dtype)
