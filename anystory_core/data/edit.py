"""Samples -> the same samples with something more, in place or in a new folder.

In place each shard is replaced by its new self, whole, or stays as it was. A sample that cannot be
worked on stays as it was, too, and is counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from ..errors import DataError
from . import paths
from .convert import Converter, LeftOut, Machines, Made, Unit, run, units_of
from .index import Entry, Index, Place
from .libraries import SetupError, library
from .manifest import Report, Step, source_name
from .parts import PICTURES, split_name
from .pictures import DAMAGE
from .shards import Files

KEPT = "damaged, left as it was"
_ENDINGS = tuple(f".{extension}" for extension in PICTURES)


def edit(
    command: str,
    data: str,
    out: str,
    settings: Mapping[str, Any],
    converter: Converter,
    machines: Machines,
    *,
    per_shard: int,
) -> Report:
    """Run a converter of :class:`~.index.Entry` over the samples of ``data``: a folder of shards,
    of loose samples, or of pictures that are no samples yet. ``out``: where the shards go; "" is in
    place, which needs shards. DataError says what cannot be done."""
    pictures = _plain_pictures(data)
    if pictures:
        entries, shards = pictures, False
    else:
        index = Index.of([data])
        ((_, scan),) = index.scans
        entries, shards = list(index), scan.shards
        if scan.stray_count and not out:
            raise DataError(
                f"{data} has {scan.stray_count} files of no sample, such as {scan.strays[0]}, "
                "which would be lost in place; name another folder with --out"
            )
    if not shards and not out:
        raise DataError(f"{data} holds no shards that could be changed in place; name --out")
    if shards:
        units = [
            Unit(paths.name_of(shard), tuple(group))
            for shard, group in groupby(entries, lambda entry: entry.source)
        ]
    else:
        units = units_of(entries, per_shard)
    source = {"data": data, "name": source_name(data)}
    step = Step(command, source, settings, len(entries))
    return run(step, converter, units, out or data, machines)


def in_batches(
    entries: Sequence[Entry], size: int, change: Callable[[Sequence[Entry]], Sequence[Files]]
) -> Iterator[Made]:
    """All samples with what ``change`` makes of ``size`` of them at a time; when that fails, one by
    one. ``change`` gives the files that are new or other."""
    for start in range(0, len(entries), size):
        batch = entries[start : start + size]
        try:
            changed: Sequence[Files | Exception] = change(batch)
        except SetupError:
            raise
        except (DataError, *DAMAGE, RuntimeError, KeyError):
            changed = [_alone(entry, change) for entry in batch]
        for entry, files in zip(batch, changed, strict=True):
            if isinstance(files, Exception):
                text = str(files)
                if not text.startswith(entry.key):
                    text = f"{entry.name}: {text}"
                yield LeftOut(entry.name, KEPT, text)
                files = {}
            try:
                yield entry.name, {**read_files(entry), **files}
            except OSError as error:
                yield LeftOut(entry.name, "damaged", f"{entry.name}: {error}")


def _alone(entry: Entry, change: Callable[[Sequence[Entry]], Sequence[Files]]) -> Files | Exception:
    try:
        (files,) = change([entry])
    except SetupError:
        raise
    except (DataError, *DAMAGE, RuntimeError, KeyError) as error:
        return error
    return files


def read_files(entry: Entry) -> dict[str, bytes]:
    """All files of a sample."""
    return {suffix: place.read() for suffix, place in entry.files.items()}


def device() -> Any:
    """Where a working process runs its model: a GPU of its own, by its number, else the CPU."""
    torch = library("torch")
    count: int = torch.cuda.device_count()
    if not count:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("ANYSTORY_WORKER", "0")) % count)


def _plain_pictures(folder: str) -> list[Entry]:
    """Entries of a folder of pictures that are no parts of samples; [] when it is another one."""
    if not paths.is_folder(folder):
        return []
    found = paths.list_files(folder)
    names = [paths.name_of(path) for path in found]
    pictures = [p for p, name in zip(found, names, strict=True) if name.lower().endswith(_ENDINGS)]
    if not pictures or any(split_name(name) or name.endswith(".tar") for name in names):
        return []
    entries: list[Entry] = []
    for path in pictures:
        key, _, extension = paths.name_of(path).rpartition(".")
        files = {f"image.{extension.lower()}": Place(path)}
        entries.append(Entry(f"{paths.name_of(folder)}/{key}", files, folder, key))
    return entries
