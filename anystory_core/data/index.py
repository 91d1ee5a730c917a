"""Where the samples of a run lie: folders and WebDataset shards, scanned once, held as arrays.

Millions of samples must not cost every process gigabytes, and reader processes share what they are
forked with only as long as it is not counted by reference, so nothing here is an object a sample.
"""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ..errors import AnyStoryError

PARTS = ("reference", "target", "reference_mask", "target_mask", "image", "masks", "caption")
Kind = Literal["pair", "scene"]


class DataError(AnyStoryError):
    """Training data cannot be used as it is."""


@dataclass(frozen=True)
class Place:
    """Where one file of a sample lies: a path of its own, or a slice of a shard."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Entry:
    """One sample, not read yet. ``key`` names it in messages and caches."""

    key: str
    files: Mapping[str, Place]  # suffix after the key, e.g. "reference.png"

    @property
    def kind(self) -> Kind | None:
        """What its files make of it; None when some are missing."""
        return kind_of(self.files)


def kind_of(names: Iterable[str]) -> Kind | None:
    """What files with these suffixes make of a sample; None when some are missing."""
    stems = {name.rsplit(".", 1)[0] for name in names}
    if {"reference", "target", "caption"} <= stems:
        return "pair"
    return "scene" if {"image", "masks", "caption"} <= stems else None


@dataclass(frozen=True)
class _Source:
    """A folder or a shard; ``name`` of what the run was given begins its samples' keys."""

    name: str
    path: Path
    shard: bool


@dataclass(frozen=True)
class _Found:
    """A file in a source: its sample's key, its suffix as written, and its slice of a shard."""

    key: str
    suffix: str
    offset: int = 0
    size: int = -1


class Index:
    """All samples of a run, by position."""

    def __init__(self) -> None:
        self._sources: list[_Source] = []
        self._suffixes: list[tuple[str, ...]] = []  # all that samples have, as written
        self._number: dict[tuple[str, ...], int] = {}  # of each of these
        self._keys = bytearray()
        # For each sample: source, which suffixes, end of its key, first of its files.
        self._source, self._which = array("i"), array("i")
        self._key_end, self._file = array("q"), array("q")
        self._offset, self._size = array("q"), array("q")  # for each file

    @classmethod
    def of(cls, paths: tuple[str, ...]) -> Index:
        """Scan folders and shards in the given order. DataError names a path without samples."""
        index = cls()
        for path in map(Path, paths):
            if path.is_dir():
                shards = [_Source(path.name, shard, True) for shard in sorted(path.glob("*.tar"))]
                sources = shards or [_Source(path.name, path, False)]
            elif path.suffix == ".tar" and path.exists():
                sources = [_Source(path.name, path, True)]
            else:
                raise DataError(
                    f"data: {path} is neither a folder nor a .tar shard; see docs/data.md"
                )
            for source in sources:
                if not index._add(source):
                    raise DataError(
                        f"data: {source.path} holds no samples (files named KEY.caption.txt, "
                        "KEY.target.png, ...); see docs/data.md"
                    )
        return index

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, position: int) -> Entry:
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        source = self._sources[self._source[position]]
        start = self._key_end[position - 1] if position else 0
        key = os.fsdecode(bytes(self._keys[start : self._key_end[position]]))
        files: dict[str, Place] = {}
        for i, suffix in enumerate(self._suffixes[self._which[position]], self._file[position]):
            path = source.path if source.shard else source.path / f"{key}.{suffix}"
            files[suffix.lower()] = Place(str(path), self._offset[i], self._size[i])
        return Entry(f"{source.name}/{key}", files)

    def __iter__(self) -> Iterator[Entry]:
        return (self[position] for position in range(len(self)))

    def of_kinds(
        self, kinds: Sequence[Kind], *, whole: bool = False
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions of the samples of these kinds; unless ``whole``, also of those that are of none
        because a file is missing."""
        wanted = kinds if whole else (*kinds, None)
        fits = np.array([kind_of(map(str.lower, names)) in wanted for names in self._suffixes])
        return np.flatnonzero(fits[np.frombuffer(self._which, np.int32)])

    def _add(self, source: _Source) -> int:
        """Scan one folder or shard; how many samples it holds."""
        samples: dict[str, dict[str, _Found]] = {}
        for file in _shard(source.path) if source.shard else _folder(source.path):
            if file.suffix.lower().partition(".")[0] in PARTS:
                samples.setdefault(file.key, {})[file.suffix.lower()] = file
        self._sources.append(source)
        for key, files in sorted(samples.items()):
            found = [file for _, file in sorted(files.items())]
            suffixes = tuple(file.suffix for file in found)
            if suffixes not in self._number:
                self._number[suffixes] = len(self._suffixes)
                self._suffixes.append(suffixes)
            self._which.append(self._number[suffixes])
            self._source.append(len(self._sources) - 1)
            self._keys += os.fsencode(key)
            self._key_end.append(len(self._keys))
            self._file.append(len(self._offset))
            self._offset.extend(file.offset for file in found)
            self._size.extend(file.size for file in found)
        return len(samples)


def _folder(path: Path) -> Iterator[_Found]:
    for root, _, files in os.walk(path):
        inside = os.path.relpath(root, path)
        for file in files:
            key, _, suffix = file.partition(".")
            yield _Found(key if inside == "." else f"{inside}/{key}", suffix)


def _shard(path: Path) -> Iterator[_Found]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, slash, file = member.name.rpartition("/")
                    key, _, suffix = file.partition(".")
                    yield _Found(f"{folder}{slash}{key}", suffix, member.offset_data, member.size)
                cast(Any, tar).members.clear()  # it keeps every header otherwise
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"data: shard {path} cannot be read ({error}); make it again") from error
