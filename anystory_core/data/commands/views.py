"""Groups from objects: folders of renders, or 3D models (GLB, glTF, OBJ) that are rendered.

FOLDER holds one folder of pictures for each object, best with alpha, which go into the shards as
they are; or models, which are rendered from --views sides all around (VTK, no GPU needed). Every
view is written once; training pairs any two.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import ImageColor

from ...errors import DataError
from .. import paths
from ..convert import Made, each
from ..parts import PICTURES
from ..pictures import png, size_of
from ..render import MODELS, Look, render
from ..shards import Files, mask_png, picture_files
from .options import add_common, convert

_ENDINGS = tuple(f".{extension}" for extension in PICTURES)


@dataclass(frozen=True)
class Thing:
    """One object: the pictures of it, or one file that is its model."""

    name: str
    files: tuple[str, ...]
    model: bool


@dataclass(frozen=True)
class Groups:
    """Objects -> groups. ``background``: a colour behind rendered models; "" leaves alpha."""

    look: Look
    background: str
    caption: str

    def samples(self, items: Sequence[Thing]) -> Iterator[Made]:
        return each(items, self._group)

    def _group(self, thing: Thing) -> Iterable[tuple[str, Files]]:
        word = thing.name.rpartition("/")[2].replace("_", " ").replace("-", " ")
        files: dict[str, bytes] = {"caption.txt": self.caption.replace("{name}", word).encode()}
        files |= self._rendered(thing) if thing.model else _given(thing)
        yield thing.name, files

    def _rendered(self, thing: Thing) -> Files:
        files: dict[str, bytes] = {}
        with paths.local_copy(thing.files[0]) as model:
            views = render(model, self.look)
        for number, view in enumerate(views):
            if not self.background:
                files[f"view{number}.png"] = png(view)
                continue
            colour = np.array(ImageColor.getrgb(self.background)[:3], np.float32)
            alpha = view[..., 3:].astype(np.float32) / 255
            laid = view[..., :3] * alpha + colour * (1 - alpha)
            files[f"view{number}.png"] = png(laid.round().astype(np.uint8))
            files[f"view{number}_mask.png"] = mask_png(view[..., 3] > 127)
        return files


def _given(thing: Thing) -> Files:
    files: dict[str, bytes] = {}
    for number, path in enumerate(thing.files):
        content = paths.read(path)
        kind, _, _ = size_of(content, f"{thing.name}/{paths.name_of(path)}")
        files |= picture_files(f"view{number}", content, kind, path)
    return files


def list_things(folder: str) -> list[Thing]:
    """The objects of a folder, by name. DataError when there are none."""
    if not paths.is_folder(folder):
        raise DataError(f"{folder} is no folder of renders or of 3D models")
    things = [
        Thing(paths.name_of(path).rpartition(".")[0], (path,), True)
        for path in paths.list_files(folder, MODELS)
    ]
    for inside in paths.list_folders(folder):
        name = paths.name_of(inside)
        pictures = paths.list_files(inside, _ENDINGS)
        if len(pictures) > 1:
            things.append(Thing(name, tuple(pictures), False))
        for path in paths.list_files(inside, MODELS):
            stem = paths.name_of(path).rpartition(".")[0]
            things.append(Thing(f"{name}/{stem}", (path,), True))
    if not things:
        raise DataError(f"{folder} holds neither folders of pictures nor {', '.join(MODELS)} files")
    return things


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="of objects: a folder of renders each, or 3D models")
    parser.add_argument("--views", type=int, default=7, help="of a model; default: %(default)s")
    parser.add_argument("--size", type=int, default=768, help="in pixels; default: %(default)s")
    parser.add_argument(
        "--elevation", type=float, default=20.0, help="of the camera; default: %(default)s degrees"
    )
    parser.add_argument(
        "--light", choices=("studio", "even", "side"), default="studio", help="on models"
    )
    parser.add_argument(
        "--background", default="", help="a colour behind models, such as #808080; default: alpha"
    )
    parser.add_argument(
        "--caption", default="{name}", help="{name} is the object's; default: %(default)s"
    )
    add_common(parser, per_shard=200)


def run(options: argparse.Namespace) -> int:
    if options.views < 2 or not 16 <= options.size <= 8192:
        raise DataError("--views: 2 or more, --size: from 16 to 8192 pixels")
    try:
        if options.background:
            ImageColor.getrgb(options.background)
    except ValueError as error:
        raise DataError(f"--background: {error}") from error
    os.environ.pop("DISPLAY", None)  # VTK would try to open windows there
    look = Look(options.views, options.size, options.elevation, options.light)
    settings = {**asdict(look), "background": options.background, "caption": options.caption}
    groups = Groups(look, options.background, options.caption)
    things = list_things(options.folder)
    return convert("views", options, {"folder": options.folder}, settings, things, groups)
