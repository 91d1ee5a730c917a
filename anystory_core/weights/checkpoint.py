"""Modules <-> ``.safetensors`` files.

A file holds any of the parts of :data:`~.model.PARTS`. Its header carries ``anystory.format`` and
``anystory.config`` (JSON), so sizes are never guessed from widgets. Loading is strict: a missing,
unknown or misshapen tensor is named with what was expected. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..bases.sdxl.config import AnyStoryConfig
from ..errors import CheckpointError, ConfigError
from ..tensor_files import FLOATS, raw_header, read_into, save_tensors
from .fingerprint import file_fingerprint
from .model import PARTS, AnyStoryModel, build_model

FORMAT = "1"
SDXL = "sdxl"  # the family of files that name none
Config = TypeVar("Config")


class Weights(Protocol):
    """The modules of one weights file, of any base model."""

    fingerprint: str

    def modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...


Model = TypeVar("Model", bound=Weights)


@dataclass(frozen=True)
class Header(Generic[Config]):
    """What a file says of itself, read without touching its tensors."""

    config: Config
    parts: tuple[str, ...]
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # safetensors names, e.g. "BF16"
    fingerprint: str


def read_header(path: str | os.PathLike[str]) -> Header[AnyStoryConfig]:
    """Read and check the header of one of our files for SDXL. CheckpointError otherwise."""
    family = file_family(path)
    if family != SDXL:
        raise CheckpointError(
            f"{Path(path).name}: holds AnyStory weights for {family}, expected some for {SDXL}"
        )
    return read_header_as(path, AnyStoryConfig.from_json, PARTS)


def file_family(path: str | os.PathLike[str]) -> str:
    """The base model that a file of ours is for. CheckpointError: it is none of ours.

    Files for SDXL were there first and do not say so."""
    _, fields = _fields(Path(path))
    try:
        config: object = json.loads(str(fields["anystory.config"]))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{Path(path).name}: anystory.config is not JSON: {error}") from error
    family = cast("dict[str, object]", config).get("family") if isinstance(config, dict) else None
    return family if isinstance(family, str) else SDXL


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The fields of a file's header, whatever base it is for. CheckpointError: it is none of
    ours."""
    return {key: str(value) for key, value in _fields(Path(path))[1].items()}


def _fields(path: Path) -> tuple[dict[str, object], dict[str, object]]:
    """The entries of a file's tensors, and the fields of its header."""
    entries = raw_header(path)
    metadata = entries.pop("__metadata__", None)
    fields = cast("dict[str, object]", metadata) if isinstance(metadata, dict) else {}
    if "anystory.config" not in fields:
        raise CheckpointError(
            f"{path.name}: not an AnyStory file (its header has no 'anystory.config'); expected "
            "one written by this project's training or conversion, or merged from such files"
        )
    if fields.get("anystory.format") != FORMAT:
        raise CheckpointError(
            f"{path.name}: anystory.format is {fields.get('anystory.format')!r}, this version "
            f"reads {FORMAT!r}; update the node pack or export the file again"
        )
    return entries, fields


def read_header_as(
    path: str | os.PathLike[str], parse: Callable[[str], Config], known: Mapping[str, str]
) -> Header[Config]:
    """Read and check the header of a file whose configuration ``parse`` reads (ConfigError) and
    whose parts have the prefixes ``known``. CheckpointError otherwise."""
    path = Path(path)
    entries, fields = _fields(path)
    try:
        config = parse(str(fields["anystory.config"]))
    except ConfigError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for name, entry in entries.items():
        try:
            info = cast("dict[str, Any]", entry)
            shapes[name] = tuple(int(n) for n in info["shape"])
            dtypes[name] = str(info["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path.name}: the entry of tensor {name!r} is damaged"
            ) from error
    parts = tuple(p for p, prefix in known.items() if any(n.startswith(prefix) for n in shapes))
    if not parts:
        raise CheckpointError(f"{path.name}: it holds no AnyStory tensor")
    text = {k: str(v) for k, v in fields.items()}
    return Header(config, parts, text, shapes, dtypes, file_fingerprint(path))


def load_model(
    path: str | os.PathLike[str],
    *,
    operations: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> AnyStoryModel:
    """Build what a file for SDXL holds and fill it. ``dtype`` None keeps each tensor's own; in a
    file that mixes them the layers of ``operations`` must cast, as the host's do."""
    header = read_header(path)
    # Built without memory first: a file that does not fit costs nothing, and no time goes into
    # initial values that the file overwrites.
    model = build_model(
        header.config, header.parts, operations=operations, dtype=dtype, device="meta"
    )
    return fill_model(path, header, model, dtype=dtype, device=device)


def fill_model(
    path: str | os.PathLike[str],
    header: Header[Any],
    model: Model,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Model:
    """Fill a model without memory (on the device meta) from its file."""
    path = Path(path)
    _check_tensors(path.name, header, {k: tuple(v.shape) for k, v in model.state_dict().items()})
    for prefix, module in model.modules():
        if dtype is None:
            for name, parameter in module.named_parameters(prefix):
                parameter.data = parameter.data.to(FLOATS[header.dtypes[name]])
        module.to_empty(device=device)
    model.fingerprint = header.fingerprint
    try:
        with torch.no_grad():
            read_into(path, model.state_dict())
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error}); get it again") from error
    for _, module in model.modules():
        module.eval().requires_grad_(False)
    return model


def save_model(
    path: str | os.PathLike[str],
    tensors: AnyStoryModel | Mapping[str, Tensor],
    config: AnyStoryConfig,
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a file atomically: it appears whole under its name or not at all. CheckpointError when
    the disk is full or the folder cannot be written to."""
    state = tensors.state_dict() if isinstance(tensors, AnyStoryModel) else tensors
    ready = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in state.items()
    }
    header = {
        **(metadata or {}),
        "anystory.format": FORMAT,
        "anystory.config": config.to_json(),
    }
    try:
        save_tensors(path, ready, header)
    except OSError as error:
        raise CheckpointError(
            f"{Path(path).name}: cannot be written in {Path(path).parent} "
            f"({error.strerror or error}); free some space there, or choose another folder"
        ) from error


def _check_tensors(name: str, header: Header[Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = sorted(set(expected) - set(header.shapes))
    unknown = sorted(set(header.shapes) - set(expected))
    if missing or unknown:
        raise CheckpointError(
            f"{name}: {len(missing)} tensors missing {missing[:3]}, {len(unknown)} unknown "
            f"{unknown[:3]}; the file does not match its own configuration"
        )
    for key, shape in expected.items():
        if header.shapes[key] != shape:
            raise CheckpointError(
                f"{name}: tensor {key} has shape {header.shapes[key]}, expected {shape}"
            )
        if header.dtypes[key] not in FLOATS:
            raise CheckpointError(
                f"{name}: tensor {key} is {header.dtypes[key]}, expected one of {sorted(FLOATS)}"
            )
