"""Training samples from folders and WebDataset shards. The schema is in docs/data.md.

Files of one sample share a key: ``KEY.caption.txt`` and

- pair: ``KEY.reference.EXT`` (RGB, or RGBA whose alpha is the mask), optionally
  ``KEY.reference_mask.EXT``, ``KEY.target.EXT``, and optionally ``KEY.target_mask.EXT``, where the
  subject is in the target;
- scene: ``KEY.image.EXT`` and ``KEY.masks.png``, 8 or 16 bit, 0 = background, i = subject i;
- group: two or more ``KEY.viewN.EXT`` of one subject, each optionally with ``KEY.viewN_mask.EXT``
  and a caption of its own, ``KEY.viewN_caption.txt``. Two of them make a pair.

A transparent target or image lies on white, as renderings do; a target's alpha is its mask where no
other is given. EXT is png, jpg, jpeg or webp. ``KEY.words.json`` may list what the subjects are
called, in the order of their masks. Samples are read by position (:mod:`.index`), so order,
shuffling and resume need no state but a number; shards must be uncompressed tar files.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import DataError
from . import parts, pictures
from .index import Entry, Place


@dataclass(frozen=True)
class Raw:
    """One decoded sample. Pictures (H,W,3) float in [0,1]; masks (N,H,W) float, 1 = subject.

    pair: one reference with its mask (or None); masks has the subject's, or is empty. scene:
    references are cut from the target by its masks."""

    key: str
    caption: str
    target: Tensor
    masks: Tensor
    reference: Tensor | None = None  # (H,W,3 or 4)
    reference_mask: Tensor | None = None  # (H,W)


def decode(entry: Entry, views: tuple[str, str] | None = None) -> Raw:
    """Read one sample. ``views``: which ones of a group are reference and target, of
    :func:`draw_views`; by default the first two. DataError says which file of it is bad."""
    kind = check_names(entry)
    if kind == "group":
        reference, target = views or draw_views(entry, random.Random(0))
        own = f"{target}_caption.txt"
        caption = read_caption(entry, own if own in entry.files else "caption.txt")
        return _pair(entry, reference, target, caption)
    caption = read_caption(entry, "caption.txt")
    if kind == "pair":
        return _pair(entry, "reference", "target", caption)
    target, _ = pictures.on_white(_picture(entry, "image"))
    labels = _labels(entry, (target.shape[0], target.shape[1]))
    numbers = [int(n) for n in cast(Any, labels).unique().tolist() if n]
    masks = [(labels == n).float() for n in numbers]
    stacked = torch.stack(masks) if masks else torch.zeros(0, *labels.shape)
    return Raw(entry.key, caption, target, stacked)


def check_names(entry: Entry) -> parts.Kind:
    """The kind of a sample. DataError: files are missing, misspelt, or there in two formats."""
    for suffix in parts.unknown(entry.files):
        if parts.is_meant_as_part(suffix):
            raise DataError(f"{entry.key}: {suffix} is no part of a sample; {parts.advice(suffix)}")
    if entry.kind is None:
        raise DataError(
            f"{entry.key}: has {sorted(entry.files)}, which is neither a pair nor a scene nor a "
            "group"
        )
    stems = [name.rpartition(".")[0] for name in sorted(entry.files)]
    for one, other in zip(stems, stems[1:], strict=False):
        if one == other and one:
            raise DataError(f"{entry.key}: {one} is there in two formats; delete one")
    return entry.kind


def draw_views(entry: Entry, rng: random.Random) -> tuple[str, str]:
    """Two views of a group, (reference, target), never the same picture. DataError when all of
    them are."""
    views = parts.views_of_group(entry.files)
    target = rng.choice(views)
    others = [view for view in views if view != target]
    rng.shuffle(others)
    shown = _place(entry, target)
    for reference in others:
        if not _same(_place(entry, reference), shown):
            return reference, target
    raise DataError(f"{entry.key}: all of its views are the same picture as {target}")


def read_caption(entry: Entry, name: str) -> str:
    """A caption file's text, without what editors put before and after it."""
    try:
        return entry.files[name].read().decode("utf-8-sig").strip()
    except (KeyError, OSError) as error:
        raise DataError(f"{entry.key}: {name} cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{entry.key}: {name} is not UTF-8 ({error}); save it as UTF-8") from error


def read_words(entry: Entry) -> list[str]:
    """What the subjects are called, in order; [] where ``words.json`` is not given."""
    place = entry.files.get(parts.WORDS)
    if place is None:
        return []
    try:
        words: Any = json.loads(place.read())
    except (OSError, ValueError) as error:
        raise DataError(f"{entry.key}: {parts.WORDS} cannot be read ({error})") from error
    if not isinstance(words, list) or not all(isinstance(w, str) for w in cast("list[Any]", words)):
        raise DataError(f'{entry.key}: {parts.WORDS} must be a list of words, such as ["dog"]')
    return cast("list[str]", words)


def _pair(entry: Entry, reference: str, target: str, caption: str) -> Raw:
    picture, alpha = pictures.on_white(_picture(entry, target))
    masks = torch.zeros(0, *picture.shape[:2]) if alpha is None else alpha[None]
    mask = _mask(entry, f"{target}_mask")
    if mask is not None:
        if mask.shape != picture.shape[:2]:
            file = _file(entry, f"{target}_mask")
            raise DataError(
                f"{entry.key}: {file} is {tuple(mask.shape)}, the picture "
                f"{tuple(picture.shape[:2])}"
            )
        masks = mask[None]
    shown = _picture(entry, reference)
    return Raw(entry.key, caption, picture, masks, shown, _own_mask(entry, reference, shown))


def _own_mask(entry: Entry, stem: str, picture: Tensor) -> Tensor | None:
    """The mask of a reference, at its size. DataError when it or the alpha leaves no subject."""
    mask = _mask(entry, f"{stem}_mask")
    if mask is None:
        if picture.shape[-1] == 4 and not bool((picture[..., 3] > 0.5).any()):
            raise DataError(f"{entry.key}: {_file(entry, stem)} is transparent everywhere")
        return None
    file = _file(entry, f"{stem}_mask")
    if mask.shape != picture.shape[:2]:
        raise DataError(
            f"{entry.key}: {file} is {tuple(mask.shape)}, {_file(entry, stem)} "
            f"{tuple(picture.shape[:2])}"
        )
    if not bool((mask > 0.5).any()):
        raise DataError(f"{entry.key}: {file} is empty; white marks the subject")
    return mask


def _file(entry: Entry, stem: str) -> str | None:
    """The name of a picture among a sample's files."""
    for extension in parts.PICTURES:
        if f"{stem}.{extension}" in entry.files:
            return f"{stem}.{extension}"
    return None


def _place(entry: Entry, stem: str) -> Place:
    name = _file(entry, stem)
    if name is None:
        raise DataError(f"{entry.key}: no {stem} picture among {sorted(entry.files)}")
    return entry.files[name]


def _same(one: Place, other: Place) -> bool:
    """Whether two files are the same, of which most differ in size."""
    return (one.size < 0 or one.size == other.size) and one.read() == other.read()


def _picture(entry: Entry, stem: str) -> Tensor:
    place = _place(entry, stem)
    name = f"{entry.key}: {_file(entry, stem)}"
    return pictures.to_tensor(pictures.open_picture(place.read, name))


def _mask(entry: Entry, stem: str) -> Tensor | None:
    file = _file(entry, stem)
    if file is None:
        return None
    name = f"{entry.key}: {file}"
    return pictures.soft_mask(pictures.open_picture(entry.files[file].read, name), name)


def _labels(entry: Entry, size: tuple[int, int]) -> Tensor:
    """The numbers of ``masks`` (H,W) int64."""
    file = _file(entry, "masks")
    name = f"{entry.key}: {file}"
    labels = pictures.instance_labels(
        pictures.open_picture(_place(entry, "masks").read, name), name
    )
    if labels.shape != size:
        raise DataError(f"{name} is {tuple(labels.shape)}, the picture {size}")
    return torch.as_tensor(labels)
