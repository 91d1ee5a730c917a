"""Pairs from a Hugging Face data set of picture pairs, as parquet files on a disk.

Two columns of pictures (--reference, --target), or one whose pictures show both side by side
(--halves; Subjects200K's have 8 pixels around each: --padding 8). Columns inside of others are
named with dots, as in description.description_1. With --both-ways each sample is a group of two
views, so that either can be the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import numpy as np

from ...errors import DataError
from .. import paths
from ..convert import DAMAGED, Filtered, LeftOut, Made, Unread, each
from ..libraries import library
from ..pictures import open_picture, png, size_of
from ..shards import Files, picture_files
from .options import add_common, convert


@dataclass(frozen=True)
class Row:
    """One row of a file: which group of rows it is in, and where in that."""

    path: str
    group: int
    place: int
    number: int

    @property
    def name(self) -> str:
        return f"{paths.name_of(self.path)}:{self.number}"

    @property
    def key(self) -> str:
        return f"{paths.name_of(self.path).rpartition('.')[0]}-{self.number:07d}"


@dataclass(frozen=True)
class Columns:
    """Where a row has what. ``halves`` or ``reference`` and ``target``; ``at_least``: numbers that
    a column must reach."""

    reference: str
    target: str
    halves: str
    padding: int
    caption: str
    reference_caption: str
    both_ways: bool
    at_least: tuple[tuple[str, float], ...]

    @property
    def names(self) -> list[str]:
        """All that is read of a row."""
        given = [self.reference, self.target, self.halves, self.caption, self.reference_caption]
        return [name for name in [*given, *(name for name, _ in self.at_least)] if name]


@dataclass(frozen=True)
class Pairs:
    """Rows -> pairs, or groups of two."""

    columns: Columns

    def samples(self, items: Sequence[Row | Unread]) -> Iterator[Made]:
        unread = [item for item in items if isinstance(item, Unread)]
        yield from each(unread, lambda _: ())
        found = [item for item in items if isinstance(item, Row)]
        for (path, group), rows in groupby(found, lambda row: (row.path, row.group)):
            chosen = list(rows)
            try:
                table = self._read(path, group)
            except DataError as error:
                yield from (LeftOut(row.name, DAMAGED, str(error)) for row in chosen)
                continue
            for row in chosen:
                (values,) = table.slice(row.place, 1).to_pylist()
                yield from each([row], lambda _, row=row, values=values: self._pair(row, values))

    def _read(self, path: str, group: int) -> Any:
        tops = sorted({name.partition(".")[0] for name in self.columns.names})
        arrow = library("pyarrow", "pyarrow")
        try:
            with paths.open_file(path) as file:
                return _parquet().ParquetFile(file).read_row_group(group, columns=tops)
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{path}: its rows cannot be read ({error})") from error

    def _pair(self, row: Row, values: Mapping[str, Any]) -> Iterable[tuple[str, Files]]:
        columns = self.columns
        for name, least in columns.at_least:
            number = _value(values, name)
            if not isinstance(number, (int, float)) or number < least:
                raise Filtered(f"{name} below {least:g}")
        parts = ("view0", "view1") if columns.both_ways else ("reference", "target")
        files: dict[str, bytes] = {}
        if columns.halves:
            one, other = _halves(_bytes(values, columns.halves), columns.padding, row.name)
            files = {f"{parts[0]}.png": png(one), f"{parts[1]}.png": png(other)}
        else:
            for part, name in zip(parts, (columns.reference, columns.target), strict=True):
                content = _bytes(values, name)
                kind, _, _ = size_of(content, f"{row.name}: {name}")
                files |= picture_files(part, content, kind, row.name)
        files["caption.txt"] = _text(values, columns.caption).encode()
        if columns.both_ways and columns.reference_caption:
            own = _text(values, columns.reference_caption)
            files["view0_caption.txt"] = own.encode()
        yield row.key, files


def _halves(content: bytes, padding: int, name: str) -> tuple[Any, Any]:
    """The left and the right picture (H,W,3) uint8, without what is around them."""
    whole = np.array(open_picture(content, name).convert("RGB"))
    width = whole.shape[1] // 2
    if whole.shape[0] <= 2 * padding or width <= 2 * padding:
        raise DataError(f"{name}: {whole.shape[1]}x{whole.shape[0]} leaves nothing in the padding")
    rows = slice(padding, whole.shape[0] - padding)
    left, right = (
        whole[rows, padding : width - padding],
        whole[rows, width + padding : -padding or None],
    )
    return left, right[:, : left.shape[1]]


def _value(values: Mapping[str, Any], name: str) -> Any:
    """The value of a column, through dots; None where there is none."""
    found: Any = values
    for part in name.split("."):
        found = cast("Mapping[str, Any]", found).get(part) if isinstance(found, Mapping) else None
    return found


def _bytes(values: Mapping[str, Any], name: str) -> bytes:
    """A picture as Hugging Face keeps it, {bytes, path}, or bytes alone."""
    value = _value(values, name)
    if isinstance(value, Mapping):
        value = cast("Mapping[str, Any]", value).get("bytes")
    if not isinstance(value, bytes):
        raise DataError(f"{name} holds no picture's bytes; save the data set with its pictures")
    return value


def _text(values: Mapping[str, Any], name: str) -> str:
    if not name:
        return ""
    value = _value(values, name)
    if isinstance(value, list):
        value = next(iter(cast("list[Any]", value)), None)
    if not isinstance(value, str):
        raise DataError(f"{name} holds no text")
    return " ".join(value.split())


def _parquet() -> Any:
    return library("pyarrow.parquet", "pyarrow")


def list_rows(files: Sequence[str], columns: Columns) -> list[Row | Unread]:
    """All rows of all files, and the files that are none or lack a column. DataError: all are."""
    rows: list[Row | Unread] = []
    arrow = library("pyarrow", "pyarrow")
    for path in files:
        try:
            with paths.open_file(path) as file:
                opened = _parquet().ParquetFile(file)
                names: list[str] = opened.schema_arrow.names
                counts = [
                    opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)
                ]
        except (OSError, arrow.ArrowException) as error:
            rows.append(Unread(paths.name_of(path), f"{path} is no parquet file ({error})"))
            continue
        missing = sorted({name.partition(".")[0] for name in columns.names} - set(names))
        if missing:
            text = f"{path} has no column {missing[0]}; it has {', '.join(names)}"
            rows.append(Unread(paths.name_of(path), text))
            continue
        number = 0
        for group, count in enumerate(counts):
            for place in range(count):
                rows.append(Row(path, group, place, number))
                number += 1
    unread = [row for row in rows if isinstance(row, Unread)]
    if len(unread) == len(rows):
        raise DataError(unread[0].why if unread else f"no parquet files in {list(files)}")
    return rows


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", help="parquet files, or folders of them")
    parser.add_argument("--reference", default="", help="column of the reference's picture")
    parser.add_argument("--target", default="", help="column of the target's picture")
    parser.add_argument("--halves", default="", help="column of pictures that show both")
    parser.add_argument("--padding", type=int, default=0, help="pixels around each half")
    parser.add_argument("--caption", default="", help="column of the target's caption")
    parser.add_argument("--reference-caption", default="", help="with --both-ways: of the other's")
    parser.add_argument("--both-ways", action="store_true", help="groups of two instead of pairs")
    parser.add_argument(
        "--at-least",
        action="append",
        default=[],
        metavar="COLUMN=NUMBER",
        help="leave out rows below, such as quality_assessment.objectConsistency=5",
    )
    add_common(parser)


def run(options: argparse.Namespace) -> int:
    if bool(options.halves) == bool(options.reference and options.target):
        raise DataError("name --halves, or --reference and --target, and not both")
    settings = {name: getattr(options, name) for name in _SETTINGS}
    limits = tuple(_limit(text) for text in options.at_least)
    named: dict[str, Any] = {**settings, "at_least": limits}
    columns = Columns(**named)
    files: list[str] = []
    for path in options.files:
        files += paths.list_files(path, (".parquet",)) if paths.is_folder(path) else [path]
    rows = list_rows(files, columns)
    return convert("parquet", options, {"files": files}, settings, rows, Pairs(columns))


_SETTINGS = (
    "reference", "target", "halves", "padding", "caption", "reference_caption", "both_ways",
    "at_least",
)  # fmt: skip


def _limit(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError as error:
        raise DataError(f"--at-least: got {text!r}, expected COLUMN=NUMBER") from error
