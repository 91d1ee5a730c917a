"""Groups from films: the frames of one shot, apart in time, show one subject differently.

Films are cut where a frame differs from the one before; of each shot a few frames are kept that
differ from each other. Masks of the subject, if there are, lie in --masks as FILM/000123.png, by
the film's name and the frame's number; without them the masks command makes some.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from ...errors import DataError
from .. import paths
from ..convert import Filtered, LeftOut, Made, each
from ..films import Cut, Frame, shots
from ..pictures import open_picture, png
from ..shards import Files, key_of
from .options import add_common, convert

FILMS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts")
_QUALITY = 95  # of the JPEG files; films are compressed more


@dataclass(frozen=True)
class Film:
    """One film of a folder."""

    name: str
    path: str


@dataclass(frozen=True)
class Groups:
    """Films -> a group of each shot. ``masks``: a folder, or ""."""

    cut: Cut
    masks: str
    caption: str
    lossless: bool

    def samples(self, items: Sequence[Film]) -> Iterator[Made]:
        for film in items:
            alone: list[LeftOut] = []
            yield from each([film], lambda f, alone=alone: self._groups(f, alone))
            yield from alone

    def _groups(self, film: Film, alone: list[LeftOut]) -> Iterable[tuple[str, Files]]:
        """All groups of a film; ``alone`` receives its shots without a second frame."""
        made: list[tuple[str, Files]] = []
        with paths.local_copy(film.path) as local:
            for number, frames in enumerate(shots(local, self.cut)):
                if self.masks:
                    frames = [frame for frame in frames if paths.exists(self._mask(film, frame))]
                if len(frames) < 2:
                    name = f"{film.name} shot {number}"
                    alone.append(LeftOut(name, "a shot without two frames to keep"))
                    continue
                made.append((f"{key_of(film.name)}-{number:04d}", self._files(film, frames)))
        if not made and not alone:
            raise Filtered("a film without frames")
        return made

    def _mask(self, film: Film, frame: Frame) -> str:
        folder = paths.join(self.masks, key_of(film.name))
        return paths.join(folder, f"{frame.number:06d}.png")

    def _files(self, film: Film, frames: Sequence[Frame]) -> Files:
        files: dict[str, bytes] = {"caption.txt": self.caption.encode()}
        for number, frame in enumerate(frames):
            if self.lossless:
                files[f"view{number}.png"] = png(frame.picture)
            else:
                files[f"view{number}.jpg"] = _jpeg(frame)
            if self.masks:
                path = self._mask(film, frame)
                content = paths.read(path)
                height, width = frame.picture.shape[:2]
                if open_picture(content, path).size != (width, height):
                    raise DataError(f"{path} is not of the frame's size, {width}x{height}")
                files[f"view{number}_mask.png"] = content
        return files


def _jpeg(frame: Frame) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(np.asarray(frame.picture))
    picture.save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return file.getvalue()


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help=f"of films ({', '.join(FILMS)})")
    parser.add_argument("--masks", default="", help="folder of masks; frames without are left out")
    parser.add_argument("--views", type=int, default=5, help="of a shot; default: %(default)s")
    parser.add_argument(
        "--apart", type=float, default=0.5, help="seconds between them; default: %(default)s"
    )
    parser.add_argument(
        "--cut",
        type=float,
        default=0.15,
        help="mean difference of two frames, in [0,1], at which a shot ends; default: %(default)s",
    )
    parser.add_argument(
        "--least-change",
        type=float,
        default=0.02,
        help="mean difference of any two that are kept; default: %(default)s",
    )
    parser.add_argument("--lossless", action="store_true", help="frames as PNG instead of JPEG")
    parser.add_argument("--caption", default="", help="of every sample; better: captions")
    add_common(parser, per_shard=20)


def run(options: argparse.Namespace) -> int:
    if options.views < 2 or options.apart < 0:
        raise DataError("--views: 2 or more, --apart: 0 or more")
    if not paths.is_folder(options.folder):
        raise DataError(f"{options.folder} is no folder of films")
    films = [Film(paths.name_of(path), path) for path in paths.list_files(options.folder, FILMS)]
    if not films:
        raise DataError(f"{options.folder} holds no films ({', '.join(FILMS)})")
    cut = Cut(options.views, options.apart, options.cut, options.least_change)
    settings = {**asdict(cut), "masks": options.masks, "lossless": options.lossless}
    settings["caption"] = options.caption
    groups = Groups(cut, options.masks, options.caption, options.lossless)
    return convert("video", options, {"folder": options.folder}, settings, films, groups)
