"""Modules <-> ``.safetensors`` files.

A file holds any of the parts of :data:`~.model.PARTS`. Its header carries ``anystory.format`` and
``anystory.config`` (JSON), so sizes are never guessed from widgets. Loading is strict: a missing,
unknown or misshapen tensor is named with what was expected. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from ..bases.sdxl.config import AnyStoryConfig
from ..errors import CheckpointError, ConfigError
from .model import PARTS, AnyStoryModel, build_model

FORMAT = "1"
_MAX_HEADER = 100 * 2**20  # the limit that safetensors itself sets
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors has the number in its text only
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Header:
    """What a file says of itself, read without touching its tensors."""

    config: AnyStoryConfig
    parts: tuple[str, ...]
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # safetensors names, e.g. "BF16"
    fingerprint: str


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of one of our files. CheckpointError otherwise."""
    path = Path(path)
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
    try:
        config = AnyStoryConfig.from_json(str(fields["anystory.config"]))
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
    parts = tuple(p for p, prefix in PARTS.items() if any(n.startswith(prefix) for n in shapes))
    if not parts:
        raise CheckpointError(f"{path.name}: it holds no AnyStory tensor")
    text = {k: str(v) for k, v in fields.items()}
    return Header(config, parts, text, shapes, dtypes, _fingerprint(path))


def load_model(
    path: str | os.PathLike[str],
    *,
    operations: Any = nn,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> AnyStoryModel:
    """Build what the file holds and fill it. ``dtype`` None keeps each tensor's own; in a file that
    mixes them the layers of ``operations`` must cast, as the host's do."""
    path = Path(path)
    header = read_header(path)
    # Built without memory first: a file that does not fit costs nothing, and no time goes into
    # initial values that the file overwrites.
    model = build_model(
        header.config, header.parts, operations=operations, dtype=dtype, device="meta"
    )
    _check_tensors(path.name, header, {k: tuple(v.shape) for k, v in model.state_dict().items()})
    for prefix, module in model.modules():
        if dtype is None:
            for name, parameter in module.named_parameters(prefix):
                parameter.data = parameter.data.to(FLOATS[header.dtypes[name]])
        module.to_empty(device=device)
    model.fingerprint = header.fingerprint
    targets = model.state_dict()
    try:
        with open_tensors(path) as file, torch.no_grad():
            for name, target in targets.items():
                target.copy_(file.get_tensor(name))
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error}); get it again") from error
    for _, module in model.modules():
        module.eval().requires_grad_(False)
    return model


class TensorFile(Protocol):
    """What this project uses of an open safetensors file."""

    def keys(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_tensor(self, name: str) -> Tensor: ...


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Generator[TensorFile, None, None]:
    """``safetensors.safe_open`` on the CPU: tensors are read one by one, when asked for."""
    opened: Any = safe_open(str(path), framework="pt", device="cpu")
    with opened as file:
        yield cast(TensorFile, file)


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


def save_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """``safetensors.save_file`` through :func:`atomic_file`. OSError for a full disk and the like,
    which safetensors itself reports by an exception of its own."""
    with atomic_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            number = _OS_ERROR.search(str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Generator[str, None, None]:
    """Name of an empty file beside ``path`` that takes its name when the block ends well, and is
    removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


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


def raw_header(path: Path) -> dict[str, object]:
    """The JSON header of a safetensors file, checked against the file's size."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path.name}: not a safetensors file, or cut off ({size} bytes); get it again"
                )
            data: object = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be opened ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path.name}: its header is not JSON; get it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name}: its header is not a table; get it again")
    return cast("dict[str, object]", data)


def _check_tensors(name: str, header: Header, expected: Mapping[str, tuple[int, ...]]) -> None:
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


def _fingerprint(path: Path) -> str:
    """Short hash of a file's header and of 64 KiB samples over its length: cheap at any size, and
    different for different weights in practice."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for part in range(16):
            file.seek(max(0, (size - 65536) * part // 15))
            digest.update(file.read(65536))
    return digest.hexdigest()[:16]
