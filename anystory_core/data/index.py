"""Where the samples of a run lie: folders and WebDataset shards, by position."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ..errors import DataError
from . import paths
from .parts import Kind, kind_of
from .scan import Scan, scan_folder, scan_shards

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


@dataclass(frozen=True)
class Place:
    """Where one file of a sample lies: a path of its own, or a slice of a shard."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        return paths.read(self.path, self.offset, self.size)


@dataclass(frozen=True)
class Entry:
    """One sample, not read yet. ``key`` names it in messages; ``name`` in its own source."""

    key: str
    files: Mapping[str, Place]  # suffix after the key in lower case, e.g. "reference.png"
    source: str = ""  # the shard or folder
    name: str = ""

    @property
    def kind(self) -> Kind | None:
        """What its files make of it; None when some are missing."""
        return kind_of(self.files)


class Index:
    """All samples of a run, by position."""

    def __init__(self, scans: Sequence[tuple[str, Scan]]) -> None:
        """``scans`` with the name of what was given, which begins its samples' keys."""
        self.scans = tuple(scans)
        self._ends = list(accumulate(len(scan) for _, scan in scans))

    @classmethod
    def of(cls, given: Sequence[str]) -> Index:
        """Scan folders and shards in the given order. DataError names a path without samples."""
        return cls([(paths.name_of(path), _scan(path)) for path in given])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, position: int) -> Entry:
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        which = bisect_right(self._ends, position)
        name, scan = self.scans[which]
        inside = position - (self._ends[which - 1] if which else 0)
        source, key, files = scan.sample(inside)
        places: dict[str, Place] = {}
        for suffix, offset, size in files:
            path = source if scan.shards else paths.join(source, f"{key}.{suffix}")
            places[suffix.lower()] = Place(path, offset, size)
        return Entry(f"{name}/{key}", places, source, key)

    def __iter__(self) -> Iterator[Entry]:
        return (self[position] for position in range(len(self)))

    def of_kinds(
        self, kinds: Sequence[Kind], *, whole: bool = False
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions of the samples of these kinds; unless ``whole``, also of those that are of none
        because a file is missing."""
        wanted = kinds if whole else (*kinds, None)
        found: list[np.ndarray[Any, np.dtype[np.bool_]]] = [np.zeros(0, np.bool_)]
        for _, scan in self.scans:
            fits = np.array([kind_of(names) in wanted for names in scan.suffixes], np.bool_)
            found.append(fits[scan.arrays["which"]])
        return np.flatnonzero(np.concatenate(found))


def _scan(path: str) -> Scan:
    if path.lower().endswith(_PACKED) and not paths.is_folder(path):
        raise DataError(_packed(path))
    if path.endswith(".tar") and paths.exists(path) and not paths.is_folder(path):
        scan = scan_shards([path], None)
    elif paths.is_folder(path):
        shards = paths.list_files(path, (".tar",))
        packed = paths.list_files(path, _PACKED)
        if packed:
            raise DataError(_packed(packed[0]))
        scan = scan_shards(shards, path) if shards else scan_folder(path)
        if not shards:
            _refuse_nested(path)
    else:
        raise DataError(f"data: {path} is neither a folder nor a .tar shard; see docs/data.md")
    empty = _without_samples(scan)
    if empty is not None:
        raise DataError(
            f"data: {empty} holds no samples (files named KEY.caption.txt, "
            "KEY.target.png, ...); see docs/data.md"
        )
    return scan


def _without_samples(scan: Scan) -> str | None:
    """A source that holds none; None when all do."""
    held = np.bincount(scan.arrays["source"], minlength=len(scan.sources))
    return None if held.all() else scan.sources[int(np.argmin(held))]


def _packed(path: str) -> str:
    return (
        f"data: {path} is compressed, so that no sample in it can be read by itself; unpack it "
        "(gunzip makes a .tar of a .tar.gz)"
    )


def _refuse_nested(path: str) -> None:
    for folder in paths.list_folders(path):
        shards = paths.list_files(folder, (".tar", *_PACKED))
        if shards:
            raise DataError(
                f"data: {shards[0]} lies in a subfolder of {path}; name the folders of shards "
                f"themselves, such as {folder}"
            )
