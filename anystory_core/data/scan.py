"""What a folder or some shards hold, as arrays: found by reading names and tar headers once.

Millions of samples must not cost every process gigabytes, and reader processes share what they are
forked with only as long as it is not counted by reference, so nothing here is an object a sample.
Beside shards the arrays are kept in ``index.safetensors``, which all processes map into memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.numpy

from ..errors import DataError
from . import paths
from .parts import split_name

INDEX = "index.safetensors"
_VERSION = "1"
_BLOCK = 512  # of a tar file: every file in it begins at a multiple
_WHOLE = 2**32 - 1  # as a file's size: all of it
_SHOWN = 10  # strays that are kept by name
_FEW = 8  # shards that one process scans
_TYPES = {
    "source": np.int32,  # of a sample: which of ``sources``,
    "which": np.int32,  # which of ``suffixes``,
    "key_end": np.int64,  # where its key ends in ``keys``,
    "file": np.int64,  # its first file,
    "start": np.int64,  # where the first of its files begins in the shard, in blocks;
    "delta": np.uint32,  # of a file: blocks from there on,
    "size": np.uint32,  # and its bytes
    "keys": np.uint8,
}
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class Scan:
    """Samples of one folder, or of its shards. ``suffixes``: all sets of suffixes that samples
    have, as written. ``strays``: the first files that belong to none, of ``stray_count``."""

    sources: list[str]
    shards: bool
    suffixes: list[tuple[str, ...]]
    arrays: Arrays
    strays: list[str] = field(default_factory=list[str])
    stray_count: int = 0

    def __len__(self) -> int:
        return len(self.arrays["source"])

    def sample(self, position: int) -> tuple[str, str, list[tuple[str, int, int]]]:
        """(source, key, [(suffix, offset, bytes or -1 for all)])."""
        a = self.arrays
        begin = int(a["key_end"][position - 1]) if position else 0
        key = os.fsdecode(a["keys"][begin : int(a["key_end"][position])].tobytes())
        first, start = int(a["file"][position]), int(a["start"][position])
        files: list[tuple[str, int, int]] = []
        for i, suffix in enumerate(self.suffixes[int(a["which"][position])], first):
            size = int(a["size"][i])
            offset = (start + int(a["delta"][i])) * _BLOCK
            files.append((suffix, offset, -1 if size == _WHOLE else size))
        return self.sources[int(a["source"][position])], key, files


def scan_folder(folder: str) -> Scan:
    """A folder of loose files, with its subfolders. DataError when a name is there twice."""
    return _collect(folder, False, _loose(folder))


def scan_shards(shards: Sequence[str], folder: str | None) -> Scan:
    """Shards, from the index that lies in ``folder`` as far as it is true of them. One that had to
    be made or mended is kept there, if all is well and the folder can be written to.

    DataError: a shard that cannot be read, or in which a name is twice."""
    index = None if folder is None else paths.join(folder, INDEX)
    stamps = [[paths.name_of(shard), *paths.stamp(shard)] for shard in shards]
    kept = None if index is None else _read_index(index)
    if kept is not None and kept[1] == stamps:
        kept[0].sources = list(shards)
        return kept[0]
    known = {} if kept is None else {tuple(s): i for i, s in enumerate(kept[1])}
    missing = [s for s, named in zip(shards, stamps, strict=True) if tuple(named) not in known]
    scans = dict(zip(missing, _scan_all(missing), strict=True))
    for shard, named in zip(shards, stamps, strict=True):
        if kept is not None and shard not in scans:
            scans[shard] = _part(kept[0], known[tuple(named)], shard)
    whole = _join([scans[shard] for shard in shards])
    if index is not None and not index.startswith(("http://", "https://")):
        with contextlib.suppress(DataError, OSError):  # read-only data is read anew each time
            _write_index(index, whole, stamps)
    return whole


def _scan_all(shards: Sequence[str]) -> list[Scan]:
    if len(shards) <= _FEW or (os.cpu_count() or 1) == 1:
        return [_scan_shard(shard) for shard in shards]
    with ProcessPoolExecutor() as pool:
        return list(pool.map(_scan_shard, shards, chunksize=4))


def _scan_shard(shard: str) -> Scan:
    return _collect(shard, True, _members(shard))


def _loose(folder: str) -> Iterator[tuple[str, int, int]]:
    if paths.is_remote(folder):
        for path in paths.list_files(folder):
            yield paths.name_of(path), 0, _WHOLE
        return
    for root, folders, files in os.walk(folder):
        folders.sort()
        inside = os.path.relpath(root, folder)
        for file in files:
            yield file if inside == "." else f"{inside}/{file}", 0, _WHOLE


def _members(shard: str) -> Iterator[tuple[str, int, int]]:
    try:
        with paths.open_file(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    if member.size >= _WHOLE:
                        raise DataError(f"data: {shard}: {member.name} is larger than 4 GiB")
                    yield member.name, member.offset_data // _BLOCK, member.size
                cast(Any, tar).members.clear()  # it keeps every header otherwise
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"data: shard {shard} cannot be read ({error}); make it again") from error


def _collect(source: str, shards: bool, files: Iterator[tuple[str, int, int]]) -> Scan:
    """Group files by key. Files of unknown names go to the sample whose key they begin with."""
    samples: dict[str, list[tuple[str, int, int]]] = {}
    others: list[tuple[str, int, int]] = []
    for name, block, size in files:
        parts = split_name(name)
        if parts is None:
            others.append((name, block, size))
        else:
            samples.setdefault(parts[0], []).append((parts[1], block, size))
    strays: list[str] = []
    for name, block, size in others:
        key = _owner(name, samples)
        if key is None:
            strays.append(name)
        else:
            samples[key].append((name[len(key) + 1 :], block, size))
    columns: dict[str, array[int]] = {
        name: array(np.dtype(kind).char) for name, kind in _TYPES.items() if name != "keys"
    }
    keys = bytearray()
    suffixes: dict[tuple[str, ...], int] = {}
    for key, found in sorted(samples.items()):
        found.sort(key=lambda file: file[0].lower())
        names = [file[0].lower() for file in found]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"data: {source} has {key}.{twice} twice; every sample needs a key of its own, so "
                "make it again"
            )
        start = min(file[1] for file in found)
        keys += os.fsencode(key)
        columns["source"].append(0)
        columns["which"].append(
            suffixes.setdefault(tuple(file[0] for file in found), len(suffixes))
        )
        columns["key_end"].append(len(keys))
        columns["file"].append(len(columns["delta"]))
        columns["start"].append(start)
        for _, block, size in found:
            columns["delta"].append(block - start)
            columns["size"].append(size)
    arrays: Arrays = {n: np.frombuffer(c, _TYPES[n]) for n, c in columns.items()}
    arrays["keys"] = np.frombuffer(bytes(keys), np.uint8)
    shown = sorted(strays)[:_SHOWN]
    return Scan([source], shards, list(suffixes), arrays, shown, len(strays))


def _owner(name: str, samples: dict[str, Any]) -> str | None:
    """The longest key that a file's name begins with."""
    folder = name.rpartition("/")[0]
    key = name
    while "." in key[len(folder) :]:
        key = key.rpartition(".")[0]
        if key in samples:
            return key
    return None


def _join(scans: Sequence[Scan]) -> Scan:
    """Several as one, in order."""
    numbers: dict[tuple[str, ...], int] = {}
    columns: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in _TYPES}
    keys = files = sources = 0
    for scan in scans:
        a = scan.arrays
        own = [numbers.setdefault(suffixes, len(numbers)) for suffixes in scan.suffixes]
        columns["source"].append(a["source"] + np.int32(sources))
        columns["which"].append(np.array(own, np.int32)[a["which"]])
        columns["key_end"].append(a["key_end"] + keys)
        columns["file"].append(a["file"] + files)
        for name in ("start", "delta", "size", "keys"):
            columns[name].append(a[name])
        sources += len(scan.sources)
        keys += len(a["keys"])
        files += len(a["delta"])
    return Scan(
        [source for scan in scans for source in scan.sources],
        True,
        list(numbers),
        {n: np.concatenate(c) if c else np.zeros(0, _TYPES[n]) for n, c in columns.items()},
        [stray for scan in scans for stray in scan.strays][:_SHOWN],
        sum(scan.stray_count for scan in scans),
    )


def _part(scan: Scan, source: int, shard: str) -> Scan:
    """What a scan says of one of its sources."""
    a = scan.arrays
    first, last = (int(np.searchsorted(a["source"], source, side)) for side in ("left", "right"))
    rows = slice(first, last)
    key = int(a["key_end"][first - 1]) if first else 0
    file = int(a["file"][first]) if first < len(scan) else len(a["delta"])
    end = int(a["file"][last]) if last < len(scan) else len(a["delta"])
    arrays: Arrays = {
        "source": np.zeros(last - first, np.int32),
        "which": a["which"][rows],
        "key_end": a["key_end"][rows] - key,
        "file": a["file"][rows] - file,
        "start": a["start"][rows],
        "delta": a["delta"][file:end],
        "size": a["size"][file:end],
        "keys": a["keys"][key : int(a["key_end"][last - 1]) if last > first else key],
    }
    return Scan([shard], True, scan.suffixes, arrays)


def _write_index(index: str, scan: Scan, stamps: list[list[Any]]) -> None:
    notes = {
        "version": _VERSION,
        "shards": json.dumps(stamps),
        "suffixes": json.dumps(scan.suffixes),
        "strays": json.dumps([scan.strays, scan.stray_count]),
    }
    arrays = {name: np.ascontiguousarray(a) for name, a in scan.arrays.items()}
    with paths.writing(index) as file:
        cast(Any, safetensors.numpy).save_file(arrays, file, metadata=notes)


def _read_index(index: str) -> tuple[Scan, list[list[Any]]] | None:
    """The kept scan, mapped into memory, and the shards it was made of; None when there is none
    that can be read."""
    try:
        if paths.is_remote(index):
            content = memoryview(paths.read(index))
        else:
            if not Path(index).stat().st_size:
                return None
            content = np.memmap(index, np.uint8, "r").data  # all processes share its pages
        (length,) = struct.unpack("<Q", content[:8])
        header: dict[str, Any] = json.loads(bytes(content[8 : 8 + length]))
        notes: dict[str, str] = header["__metadata__"]
        if notes["version"] != _VERSION:
            return None
        arrays: Arrays = {}
        for name, kind in _TYPES.items():
            begin, end = header[name]["data_offsets"]
            arrays[name] = np.frombuffer(content[8 + length + begin : 8 + length + end], kind)
        strays, count = json.loads(notes["strays"])
        stamps: list[list[Any]] = json.loads(notes["shards"])
        suffixes = [tuple(cast("list[str]", s)) for s in json.loads(notes["suffixes"])]
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
    names = [str(named[0]) for named in stamps]
    return Scan(names, True, suffixes, arrays, strays, count), stamps
