"""Masks for samples that have none, by a segmentation model on a disk.

--model is a weights file of torchvision's Mask R-CNN, or a folder as transformers saves one:
Mask2Former and others that know instances, SAM 2, BiRefNet (with --trust-code). A scene gets all
instances; a reference, a target and each view of a group get the one nearest to the middle.
DATA is a folder of shards, which are changed in place unless --out is given, or of pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from ...errors import DataError
from ..convert import Machines, Made
from ..edit import device, edit, in_batches
from ..index import Entry
from ..parts import PICTURES, WORDS, views_of_group
from ..pictures import open_picture
from ..segmenters import Found, Segmenter, load_segmenter
from ..shards import Files, labels_png, mask_png, words_json
from .options import add_machines, say


@dataclass(frozen=True)
class Masks:
    """Samples -> the same with masks; those that have them stay as they are."""

    model: str
    words: tuple[str, ...]
    least_score: float
    least_area: float
    batch: int
    trust_code: bool

    def samples(self, items: Sequence[Entry]) -> Iterator[Made]:
        return in_batches(items, self.batch, self._change)

    @cached_property
    def _segmenter(self) -> Segmenter:
        return load_segmenter(
            self.model, device(), least_score=self.least_score, trust_code=self.trust_code
        )

    def _change(self, entries: Sequence[Entry]) -> list[Files]:
        opened = [
            (i, stem, _picture(entry, stem))
            for i, entry in enumerate(entries)
            for stem in _without_mask(entry)
        ]
        # A transparent picture has its mask in its alpha.
        opened = [(i, stem, p) for i, stem, p in opened if stem == "image" or not _transparent(p)]
        wanted = [(i, stem) for i, stem, _ in opened]
        pictures = [picture.convert("RGB") for _, _, picture in opened]
        found: list[list[Found]] = self._segmenter(pictures) if pictures else []
        files: list[dict[str, bytes]] = [{} for _ in entries]
        for (i, stem), picture, instances in zip(wanted, pictures, found, strict=True):
            kept = self._kept(instances)
            if stem != "image":
                if not kept:
                    raise DataError(f"{entries[i].key}: no subject is found in {stem}")
                files[i][f"{stem}_mask.png"] = mask_png(max(kept, key=_nearness).mask)
                continue
            kept.sort(key=lambda one: -int(one.mask.sum()))  # the smaller lies on top
            size = (picture.height, picture.width)
            files[i]["masks.png"] = labels_png([one.mask for one in kept], size)
            if any(one.word for one in kept) and WORDS not in entries[i].files:
                files[i] |= words_json([one.word for one in kept])
            if "caption.txt" not in entries[i].files:
                files[i]["caption.txt"] = b""  # the captions command's work
        return list(files)

    def _kept(self, found: list[Found]) -> list[Found]:
        """What is large enough, of a wanted kind, and not covered by what is painted later."""
        large = [one for one in found if one.mask.mean() >= max(self.least_area, 1e-9)]
        large = [one for one in large if not self.words or one.word in self.words]
        large.sort(key=lambda one: int(one.mask.sum()))
        covered: np.ndarray | None = None
        kept: list[Found] = []
        for one in large:  # the smallest first: it lies on top
            free = one.mask if covered is None else one.mask & ~covered
            if free.mean() >= max(self.least_area, 1e-9):
                kept.append(one)
                covered = one.mask if covered is None else covered | one.mask
        return kept


def _without_mask(entry: Entry) -> list[str]:
    """The pictures of a sample that lack a mask."""
    names = {name.rpartition(".")[0] for name in entry.files}
    views = views_of_group(entry.files)
    wanted = [stem for stem in ("reference", "target", *views) if stem in names]
    wanted = [stem for stem in wanted if f"{stem}_mask" not in names]
    return ["image", *wanted] if "image" in names and "masks" not in names else wanted


def _picture(entry: Entry, stem: str) -> Image.Image:
    for extension in PICTURES:
        place = entry.files.get(f"{stem}.{extension}")
        if place is not None:
            return open_picture(place.read, f"{entry.key}: {stem}.{extension}")
    raise DataError(f"{entry.key}: no {stem} picture")


def _transparent(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info


def _nearness(one: Found) -> float:
    """More for instances that are large and in the middle of the picture."""
    height, width = one.mask.shape
    ys, xs = np.mgrid[:height, :width]
    y, x = (ys + 0.5) / height - 0.5, (xs + 0.5) / width - 0.5
    return float((one.mask * np.exp(-8 * (x**2 + y**2))).sum())


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="folder of shards, of loose samples, or of pictures")
    parser.add_argument("--out", default="", help="folder of new shards; default: in place")
    parser.add_argument("--model", required=True, help="weights file or folder")
    parser.add_argument("--words", default="", help="kinds to keep, by commas; default: all")
    parser.add_argument("--least-score", type=float, default=0.7, help="default: %(default)s")
    parser.add_argument(
        "--least-area",
        type=float,
        default=0.005,
        help="of an instance, as a share of the picture; default: %(default)s",
    )
    parser.add_argument(
        "--batch", type=int, default=4, help="samples at once; default: %(default)s"
    )
    parser.add_argument(
        "--trust-code", action="store_true", help="run the Python code in the model's folder"
    )
    parser.add_argument("--per-shard", type=int, default=1000, help="where --out is not shards yet")
    add_machines(parser, workers=1)


def run(options: argparse.Namespace) -> int:
    words = tuple(word.strip() for word in options.words.split(",") if word.strip())
    masks = Masks(
        options.model, words, options.least_score, options.least_area, options.batch,
        options.trust_code,
    )  # fmt: skip
    settings = {
        name: getattr(options, name) for name in ("model", "words", "least_score", "least_area")
    }
    machines = Machines(options.workers, options.ray)
    total = edit(
        "masks", options.data, options.out, settings, masks, machines, per_shard=options.per_shard
    )
    return say(total, options.out or options.data)
