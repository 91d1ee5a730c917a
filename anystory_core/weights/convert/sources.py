"""Public files opened: the tensors that they hold, read one by one when asked for.

Only names, shapes and number types are read to decide what a file is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

from safetensors import SafetensorError
from torch import Tensor

from ...bases.sdxl.prediction import Prediction, prediction_of_file
from ...errors import CheckpointError
from ...tensor_files import FLOATS, open_tensors, raw_header
from ..fingerprint import file_sha256
from .pickles import SUFFIXES, open_pickle

# What stands beside a scaled weight, in the host's older format and its present one.
_SCALES = ("scale_weight", "weight_scale", "comfy_quant")


class Tensors(Protocol):
    """An open file of tensors."""

    def get_tensor(self, name: str) -> Tensor: ...


@dataclass
class Source:
    """The tensors of one or several files, read one by one when asked for."""

    name: str  # for messages
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    owner: dict[str, Path]
    header: dict[str, str] = field(default_factory=dict[str, str])  # what headers say besides
    scaled: set[Path] = field(default_factory=set[Path])  # files that say so in their headers
    _open: dict[Path, Tensors] = field(default_factory=dict[Path, Tensors])
    _digests: dict[Path, str] = field(default_factory=dict[Path, str])
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @classmethod
    def open(cls, files: Sequence[Path], name: str, *, pickles: bool = False) -> Source:
        """Open files. CheckpointError: of another kind, cut off or damaged. ``pickles``: files of
        ``torch.save`` are taken too (:mod:`.pickles`)."""
        source = cls(name, tuple(files), {}, {}, {})
        try:
            for path in files:
                if pickles and path.suffix in SUFFIXES:
                    source._add_pickle(path)
                else:
                    _check_suffix(path, pickles)
                    source._add(path)
        except (SafetensorError, OSError) as error:
            source.close()
            raise CheckpointError(
                f"{name}: cannot be read, it is cut off or damaged ({error}); get it again"
            ) from error
        except BaseException:
            source.close()
            raise
        return source

    def _add(self, path: Path) -> None:
        entries = raw_header(path)
        # The library compares every offset with the file's size: a cut file ends here.
        self._open[path] = self._stack.enter_context(open_tensors(path))
        metadata = entries.pop("__metadata__", None)
        if isinstance(metadata, dict):
            said = cast("dict[str, str]", metadata)
            self.header.update(said)
            if "_quantization_metadata" in said:
                self.scaled.add(path)
        for key, entry in entries.items():
            info = cast("dict[str, Any]", entry)
            self._name(path, key, tuple(int(n) for n in info["shape"]), str(info["dtype"]))

    def _add_pickle(self, path: Path) -> None:
        file = self._open[path] = open_pickle(path)
        for key, (shape, dtype) in file.describe().items():
            self._name(path, key, shape, dtype)

    def _name(self, path: Path, key: str, shape: tuple[int, ...], dtype: str) -> None:
        self.shapes[key], self.dtypes[key], self.owner[key] = shape, dtype, path

    @property
    def prediction(self) -> Prediction:
        """What a U-Net in these files predicts, as they say themselves."""
        return prediction_of_file(self.shapes, self.header)

    def get(self, key: str) -> Tensor:
        """One tensor, from the file that has it."""
        try:
            return self._open[self.owner[key]].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.name}: tensor {key} cannot be read ({error}); get the file again"
            ) from error

    def check_floats(self, keys: Sequence[str]) -> None:
        """CheckpointError unless these tensors are plain floats (not quantised)."""
        for key in keys:
            layer = key.removesuffix("weight")
            scaled = any(layer + mark in self.shapes for mark in _SCALES)
            scaled |= self.owner[key] in self.scaled and self.dtypes[key].startswith("F8")
            if self.dtypes[key] not in FLOATS or scaled:
                kind = "scaled 8-bit" if scaled else self.dtypes[key]
                raise CheckpointError(
                    f"{self.name}: tensor {key} is quantised ({kind}), expected plain floats "
                    f"({', '.join(sorted(FLOATS))}); use the fp16 or bf16 file of this model"
                )

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    def describe(self, read: Callable[[int], None] | None = None) -> str:
        """Names and SHA-256 of the files, for the header of what is made from them. ``read`` as in
        :func:`file_sha256`."""
        return ", ".join(f"{path.name} sha256:{self.digest(path, read)}" for path in self.files)

    def digest(self, path: Path, read: Callable[[int], None] | None = None) -> str:
        """SHA-256 of one of the files, which is read once for it."""
        if path not in self._digests:
            self._digests[path] = file_sha256(path, read)
        return self._digests[path]

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_suffix(path: Path, pickles: bool) -> None:
    if path.suffix == ".safetensors":
        return
    if pickles:
        raise CheckpointError(
            f"{path.name}: expected a .safetensors file, or a file of torch.save "
            f"({', '.join(SUFFIXES)})"
        )
    raise CheckpointError(
        f"{path.name}: expected a .safetensors file; other kinds can hold programs, and of "
        "checkpoints they are never opened, so get the .safetensors version of it"
    )
