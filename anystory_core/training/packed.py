"""Encodings in shards, made ahead of training by ``python -m anystory_core.data encode``.

A shard holds one file an encoding, named by the same digest as a single file of :mod:`.cache` is;
so the index of shards finds them as it finds samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..data import paths
from ..data.scan import Scan, scan_shards

PACKED = "shards"  # their folder, in that of the encodings
SUFFIX = "encoding.safetensors"
_DIGEST = 64  # letters of SHA-256
_TOLD_APART = 8  # bytes of a digest by which its place is looked up


class PackedEncodings:
    """Shards of a folder, by digest; 16 bytes an encoding in memory."""

    def __init__(self, folder: Path) -> None:
        shards = [str(shard) for shard in sorted(folder.glob("*.tar"))]
        self._scan: Scan = scan_shards(shards, str(folder) if shards else None)
        letters = np.asarray(self._scan.arrays["keys"]).reshape(-1, _DIGEST)
        starts = letters[:, : 2 * _TOLD_APART].copy().view(f"S{2 * _TOLD_APART}").ravel()
        numbers = np.array([int(start, 16) for start in starts.tolist()], np.uint64)
        self._order = np.argsort(numbers, kind="stable")
        self._numbers = numbers[self._order]

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, digest: str) -> dict[str, Tensor] | None:
        """The tensors under a digest, on the CPU; None when they are not there."""
        number = np.uint64(int(digest[: 2 * _TOLD_APART], 16))
        place = int(np.searchsorted(self._numbers, number))
        if place == len(self._numbers) or self._numbers[place] != number:
            return None
        shard, _, ((_, offset, size),) = self._scan.sample(int(self._order[place]))
        try:
            return cast(Any, safetensors.torch).load(paths.read(shard, offset, size))
        except (OSError, SafetensorError):
            return None
