"""The files of a sample, and where they are written: shards, whole or not at all, or folders."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from . import paths
from .parts import WORDS
from .pictures import open_picture, png

Files = Mapping[str, bytes]  # suffix after the key -> content

_AS_THEY_ARE = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "MPO": "jpg"}
_MOST_SUBJECTS = 2**16 - 1  # what a 16-bit picture can number


def mask_png(mask: NDArray[np.bool_]) -> bytes:
    """(H,W) as black and white."""
    return png(mask.astype(np.uint8) * 255)


def labels_png(masks: Iterable[NDArray[np.bool_]], size: tuple[int, int]) -> bytes:
    """Masks (H,W), one per subject, as the numbers of ``masks.png``; where they overlap the later
    one counts. 16 bit above 255 subjects. DataError for another size than (H,W) ``size``."""
    labels = np.zeros(size, np.uint16)
    number = 0
    for number, mask in enumerate(masks, 1):
        if number > _MOST_SUBJECTS:
            raise DataError(
                f"masks: more than {_MOST_SUBJECTS}, which is what masks.png can number"
            )
        if mask.shape != size:
            raise DataError(
                f"masks: mask {number} is {mask.shape}, expected (height, width) {size} as the "
                "picture is"
            )
        labels[mask] = number
    return png(labels if number > 255 else labels.astype(np.uint8))


def pair_files(
    *,
    reference: NDArray[np.uint8],
    target: NDArray[np.uint8],
    caption: str,
    reference_mask: NDArray[np.bool_] | None = None,
    target_mask: NDArray[np.bool_] | None = None,
) -> Files:
    """The files of a pair sample; ``target_mask`` is where the subject is in the target."""
    files = {
        "caption.txt": caption.encode(),
        "reference.png": png(reference),
        "target.png": png(target),
    }
    if reference_mask is not None:
        files["reference_mask.png"] = mask_png(reference_mask)
    if target_mask is not None:
        files["target_mask.png"] = mask_png(target_mask)
    return files


def scene_files(
    *, image: NDArray[np.uint8], masks: Iterable[NDArray[np.bool_]], caption: str
) -> Files:
    """The files of a scene sample; ``masks`` are the visible parts, one per subject. DataError
    for a mask of another size than the picture's, and for more than 65,535 of them."""
    labels = labels_png(masks, (image.shape[0], image.shape[1]))
    return {"caption.txt": caption.encode(), "image.png": png(image), "masks.png": labels}


def picture_files(stem: str, content: bytes, kind: str, name: str) -> Files:
    """A picture's file under the name of a part: its own bytes, or PNG where no sample has its
    ``kind``."""
    if kind in _AS_THEY_ARE:
        return {f"{stem}.{_AS_THEY_ARE[kind]}": content}
    return {f"{stem}.png": png(np.array(open_picture(content, name).convert("RGB")))}


def key_of(name: str) -> str:
    """A sample's key of a file's name: without its extension; folders stay. DataError for a name
    that leaves its folder."""
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{name} leaves the folder that it is in")
    return name.rpartition(".")[0] or name


def words_json(words: Sequence[str]) -> Files:
    """What the subjects are called, in the order of their masks."""
    return {WORDS: json.dumps(list(words), ensure_ascii=False).encode()}


def write_folder(samples: Iterable[tuple[str, Files]], folder: Path) -> None:
    """One file each, ``KEY.SUFFIX``."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, files in samples:
        for suffix, content in files.items():
            (folder / f"{key}.{suffix}").write_bytes(content)


def write_shards(
    samples: Iterable[tuple[str, Files]], folder: Path, *, per_shard: int = 1000
) -> None:
    """``shard-000000.tar`` and so on, each whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting: list[tuple[str, Files]] = []
    number = 0
    for sample in samples:
        waiting.append(sample)
        if len(waiting) == per_shard:
            write_shard(str(folder / shard_name(number)), waiting)
            number, waiting = number + 1, []
    if waiting:
        write_shard(str(folder / shard_name(number)), waiting)


def shard_name(number: int) -> str:
    """``shard-000000.tar`` of 0."""
    return f"shard-{number:06d}.tar"


def write_shard(path: str, samples: Iterable[tuple[str, Files]]) -> None:
    """One shard of these samples, local or remote."""
    with open_shard(path) as shard:
        for key, files in samples:
            shard.add(key, files)


class Shard:
    """A tar file that is being written, as WebDataset reads it; the same samples make the same
    bytes."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._keys: set[str] = set()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, files: Files) -> None:
        """Write one sample. DataError when its key is there already."""
        if key in self._keys:
            raise DataError(f"{key}: a key twice in a shard; every sample needs one of its own")
        self._keys.add(key)
        for suffix, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"{key}.{suffix}")
            entry.size = len(content)
            self._tar.addfile(entry, BytesIO(content))
            cast(Any, self._tar).members.clear()  # all headers otherwise stay in memory


class _Empty(Exception):
    """A shard without samples is not kept."""


@contextmanager
def open_shard(path: str) -> Generator[Shard, None, None]:
    """A shard to add samples to; it lies at ``path`` when the block ends well and there are any."""
    try:
        with paths.writing(path) as file:
            try:
                with tarfile.open(file, "w") as tar:
                    shard = Shard(tar)
                    yield shard
            except OSError as error:
                raise DataError(f"{path} cannot be written ({error})") from error
            if not len(shard):
                raise _Empty
    except _Empty:
        pass
