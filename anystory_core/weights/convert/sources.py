"""Public files opened: the tensors that they hold, read one by one when asked for.

Only headers are read to decide what a file is. Nothing is ever unpickled: ``.bin``, ``.ckpt`` and
``.pt`` files are refused by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor

from ...bases.sdxl.prediction import Prediction, prediction_of_file
from ...errors import CheckpointError
from ...tensor_files import FLOATS, TensorFile, open_tensors, raw_header
from ..fingerprint import file_sha256

# What stands beside a scaled weight, in the host's older format and its present one.
_SCALES = ("scale_weight", "weight_scale", "comfy_quant")


@dataclass
class Source:
    """The tensors of one or several safetensors files, read one by one when asked for."""

    name: str  # for messages
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    owner: dict[str, Path]
    header: dict[str, str] = field(default_factory=dict[str, str])  # what headers say besides
    scaled: set[Path] = field(default_factory=set[Path])  # files that say so in their headers
    _open: dict[Path, TensorFile] = field(default_factory=dict[Path, TensorFile])
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @classmethod
    def open(cls, files: Sequence[Path], name: str) -> Source:
        """Open files and read their headers. CheckpointError: not safetensors, or cut off."""
        source = cls(name, tuple(files), {}, {}, {})
        try:
            for path in files:
                _check_suffix(path)
                entries = raw_header(path)
                # The library compares every offset with the file's size: a cut file ends here.
                source._open[path] = source._stack.enter_context(open_tensors(path))
                metadata = entries.pop("__metadata__", None)
                if isinstance(metadata, dict):
                    said = cast("dict[str, str]", metadata)
                    source.header.update(said)
                    if "_quantization_metadata" in said:
                        source.scaled.add(path)
                for key, entry in entries.items():
                    info = cast("dict[str, Any]", entry)
                    source.shapes[key] = tuple(int(n) for n in info["shape"])
                    source.dtypes[key] = str(info["dtype"])
                    source.owner[key] = path
        except (SafetensorError, OSError) as error:
            source.close()
            raise CheckpointError(
                f"{name}: cannot be read, it is cut off or damaged ({error}); get it again"
            ) from error
        except BaseException:
            source.close()
            raise
        return source

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

    def describe(self) -> str:
        """Names and SHA-256 of the files, for the header of what is made from them."""
        return ", ".join(f"{path.name} sha256:{file_sha256(path)}" for path in self.files)

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


def _check_suffix(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path.name}: expected a .safetensors file; other kinds can hold programs and are "
            "never opened, so get the .safetensors version of it"
        )
