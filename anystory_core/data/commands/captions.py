"""Captions for samples by a vision-language model on a disk: Qwen2-VL or a successor.

A scene and a pair get the caption of the picture that is drawn, a group one of each view. Words of
the subjects (words.json) are put to the model, and follow the caption where it left them out, since
routing by text finds subjects by them. DATA is a folder of shards, changed in place unless --out is
given. --config names a TOML file with the prompt; see CaptionSettings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from ...config import from_dict
from ...errors import DataError
from .. import paths
from ..captioner import Captioner, CaptionSettings, load_captioner
from ..convert import Machines, Made
from ..edit import device, edit, in_batches
from ..index import Entry
from ..parts import PICTURES, views_of_group
from ..pictures import open_picture
from ..schema import read_words
from ..shards import Files
from .options import add_machines, say

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Captions:
    """Samples -> the same with new captions."""

    model: str
    settings: CaptionSettings
    batch: int
    only_empty: bool

    def samples(self, items: Sequence[Entry]) -> Iterator[Made]:
        return in_batches(items, self.batch, self._change)

    @cached_property
    def _captioner(self) -> Captioner:
        return load_captioner(self.model, device(), self.settings)

    def _change(self, entries: Sequence[Entry]) -> list[Files]:
        wanted = [
            (entry, stem, name)
            for entry in entries
            for stem, name in _captioned(entry)
            if not (self.only_empty and _has_text(entry, name))
        ]
        files: dict[str, dict[str, bytes]] = {entry.key: {} for entry in entries}
        for start in range(0, len(wanted), self.batch):
            part = wanted[start : start + self.batch]
            pictures = [
                open_picture(entry.files[stem].read, f"{entry.key}: {stem}").convert("RGB")
                for entry, stem, _ in part
            ]
            texts = self._captioner(pictures, [read_words(entry) for entry, _, _ in part])
            for (entry, _, name), text in zip(part, texts, strict=True):
                files[entry.key][name] = text.encode()
        return [files[entry.key] for entry in entries]


def _captioned(entry: Entry) -> list[tuple[str, str]]:
    """(picture file, caption file) of what is drawn from a sample's captions."""
    views = views_of_group(entry.files)
    stems = [(view, f"{view}_caption.txt") for view in views] or [
        ("target", "caption.txt"),
        ("image", "caption.txt"),
    ]
    return [
        (f"{stem}.{extension}", name)
        for stem, name in stems
        for extension in PICTURES
        if f"{stem}.{extension}" in entry.files
    ]


def _has_text(entry: Entry, name: str) -> bool:
    return name in entry.files and bool(entry.files[name].read().strip(b"\xef\xbb\xbf \r\n\t"))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="folder of shards, of loose samples, or of pictures")
    parser.add_argument("--out", default="", help="folder of new shards; default: in place")
    parser.add_argument("--model", required=True, help="folder as transformers saves one")
    parser.add_argument("--config", default="", help="TOML file: prompt, words, most_tokens, ...")
    parser.add_argument("--only-empty", action="store_true", help="keep the captions there are")
    parser.add_argument(
        "--batch", type=int, default=8, help="pictures at once; default: %(default)s"
    )
    parser.add_argument("--per-shard", type=int, default=1000, help="where --out is not shards yet")
    add_machines(parser, workers=1)


def run(options: argparse.Namespace) -> int:
    asked = read_config(options.config) if options.config else CaptionSettings()
    captions = Captions(options.model, asked, options.batch, options.only_empty)
    settings = {**asdict(asked), "model": options.model, "only_empty": options.only_empty}
    machines = Machines(options.workers, options.ray)
    total = edit(
        "captions", options.data, options.out, settings, captions, machines,
        per_shard=options.per_shard,
    )  # fmt: skip
    return say(total, options.out or options.data)


def read_config(path: str) -> CaptionSettings:
    """DataError: no TOML; ConfigError: a key or value that is none."""
    try:
        table = tomllib.loads(paths.read(path).decode())
    except (OSError, ValueError) as error:
        raise DataError(f"--config: {path} is no TOML file ({error})") from error
    return from_dict(CaptionSettings, table, paths.name_of(path))
