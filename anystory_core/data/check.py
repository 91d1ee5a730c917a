"""What data holds, what is wrong with it, and the figures that decide a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from multiprocessing import get_context
from typing import Any

from torch import Tensor

from ..errors import AnyStoryError, DataError
from ..subject.masks import MaskReading, find_subjects
from . import manifest, parts
from .index import Entry, Index
from .libraries import library
from .progress import bar
from .schema import Raw, check_names, decode, read_caption, read_words

SHOWN = 10
_CHUNK = 64  # samples that a process is given at a time
_CONTEXT = 77  # of CLIP's text encoder, start and end included
_AREAS = (0.01, 0.05, 0.2, 0.5)  # of a picture
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Findings:
    """Counts over samples. ``odd``: what is no damage and yet seldom meant."""

    kinds: Counter[str] = field(default_factory=Counter[str])
    sources: Counter[str] = field(default_factory=Counter[str])
    sizes: Counter[str] = field(default_factory=Counter[str])
    shapes: Counter[str] = field(default_factory=Counter[str])
    sides: Counter[int] = field(default_factory=Counter[int])  # the shorter ones, in pixels
    subjects: Counter[int] = field(default_factory=Counter[int])
    areas: Counter[str] = field(default_factory=Counter[str])
    origins: Counter[str] = field(default_factory=Counter[str])
    captions: Counter[int] = field(default_factory=Counter[int])  # lengths in tokens
    odd: Counter[str] = field(default_factory=Counter[str])
    unknown: Counter[str] = field(default_factory=Counter[str])
    bad: list[str] = field(default_factory=list[str])

    def add(self, other: Findings) -> None:
        """Count another's too."""
        for name, value in vars(other).items():
            if isinstance(value, list):
                self.bad += other.bad
            else:
                getattr(self, name).update(value)

    @property
    def good(self) -> bool:
        return not self.bad and not self.unknown


def check(
    given: Sequence[str], *, workers: int = 1, tick: Callable[[int], object] | None = None
) -> tuple[str, bool]:
    """(report, all good?). Reads every sample and cuts its references out, as a run does; of a
    group, every view. ``tick`` is told how many more have been read; by default a bar is shown."""
    index = Index.of(given)
    found = Findings()
    shown = bar("check", len(index)) if tick is None else None
    for number, part in _parts(index, workers):
        found.add(part)
        (shown.update if shown is not None else tick or int)(number)
    if shown is not None:
        shown.close()
    return "\n".join(_report(index, found)), found.good


def _parts(index: Index, workers: int) -> Iterator[tuple[int, Findings]]:
    names = {
        source: manifest.source_name(_folder(source))
        for _, scan in index.scans
        for source in scan.sources
    }
    chunks = _chunks(index, names)
    if workers > 1 and len(index) > _CHUNK:
        with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
            while waiting := [pool.submit(_look, c) for c in islice(chunks, 4 * workers)]:
                for future in waiting:
                    part = future.result()
                    yield sum(part.sources.values()), part
        return
    for chunk in chunks:
        part = _look(chunk)
        yield sum(part.sources.values()), part


def _chunks(index: Index, names: dict[str, str]) -> Iterator[list[tuple[Entry, str]]]:
    entries = iter(index)
    while chunk := [(e, names[e.source]) for e in islice(entries, _CHUNK)]:
        yield chunk


def _folder(source: str) -> str:
    """Of a shard, the folder it lies in, where the manifest is."""
    return source.rpartition("/")[0] or "." if source.endswith(".tar") else source


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _look(chunk: list[tuple[Entry, str]]) -> Findings:
    found = Findings()
    for entry, source in chunk:
        found.sources[source] += 1
        try:
            _sample(entry, found)
        except AnyStoryError as error:
            text = str(error)
            found.bad.append(text if text.startswith(entry.key) else f"{entry.key}: {text}")
    return found


def _sample(entry: Entry, found: Findings) -> None:
    kind = check_names(entry)
    found.unknown.update(parts.unknown(entry.files))
    views = parts.views_of_group(entry.files)
    if kind == "group":
        raws = [decode(entry, (v, views[i - 1])) for i, v in enumerate(views)]
    else:
        raws = [decode(entry)]
    words = read_words(entry)
    if kind == "scene" and words and len(words) != len(raws[0].masks):
        raise DataError(
            f"{entry.key}: words.json has {len(words)} words for {len(raws[0].masks)} subjects"
        )
    origins, areas = Counter[str](), Counter[str]()
    for raw in raws:
        _references(raw, origins, areas)
    found.kinds[kind] += 1
    found.subjects[len(raws[0].masks) if kind == "scene" else 1] += 1
    found.origins += origins
    found.areas += areas
    for raw in raws:
        height, width = raw.target.shape[:2]
        found.sizes[f"{width}x{height}"] += 1
        found.sides[min(height, width)] += 1
        ratio = width / height
        found.shapes["tall" if ratio < 0.9 else "wide" if ratio > 1.1 else "about square"] += 1
    if kind == "pair" and _twice(entry):
        found.odd["the reference is the target"] += 1
    for name, place in entry.files.items():
        if name.endswith(".txt"):
            text = read_caption(entry, name)
            found.captions[_tokens(text)] += 1
            found.odd["empty captions"] += not text
            found.odd["captions with a byte order mark (left away)"] += place.read().startswith(
                _BYTE_ORDER_MARK
            )
    found.odd = +found.odd


def _references(raw: Raw, origins: Counter[str], areas: Counter[str]) -> None:
    """Where the mask of each reference is from, and the share of the target that is subject."""
    if raw.reference is not None:
        origins[_origin(raw.reference, raw.reference_mask)] += 1
    else:
        origins["a file"] += len(raw.masks)
    for mask in raw.masks:
        share = float(mask.mean())
        areas[next((f"under {limit:.0%}" for limit in _AREAS if share < limit), "more")] += 1


def _origin(picture: Tensor, mask: Tensor | None) -> str:
    """What a reference is cut out by."""
    _, (found,) = find_subjects(picture[None], mask, MaskReading())
    if mask is not None:
        return "a file"
    if picture.shape[-1] == 4 and bool((picture[..., 3] < 1).any()):
        return "alpha"
    return "whole picture" if bool(found.mask.all()) else "plain background"


def _twice(entry: Entry) -> bool:
    """Whether a pair's two pictures are one and the same file."""
    found = {
        name.partition(".")[0]: place.read()
        for name, place in entry.files.items()
        if name.startswith(("reference.", "target."))
    }
    return found["reference"] == found["target"]


@cache
def _tokenizer() -> Any:
    try:
        return library("open_clip.tokenizer", "open_clip_torch").SimpleTokenizer()
    except DataError:
        return None


def _tokens(text: str) -> int:
    """How many tokens a caption has, start and end included; without CLIP's tokenizer 0."""
    tokenizer = _tokenizer()
    return 0 if tokenizer is None else len(tokenizer.encode(text)) + 2


def _report(index: Index, found: Findings) -> Iterator[str]:
    yield f"{len(index)} samples"
    yield from _table(found.kinds)
    if len(found.sources) > 1:
        yield "samples per source:"
        yield from _table(found.sources)
    yield "picture sizes:"
    yield from _table(found.sizes)
    yield "shapes: " + ", ".join(f"{n} {c}" for n, c in found.shapes.most_common())
    sides = sorted(found.sides.elements())
    if sides:
        yield f"shorter side: {sides[0]} at least, {sides[len(sides) // 2]} in the middle"
    yield "subjects per sample:"
    yield from (f"  {n}: {c}" for n, c in sorted(found.subjects.items()))
    if found.subjects[0]:
        yield "  those of 0 are for stage 'router'; stage 'subject' counts them as corrupt"
    if found.areas:
        yield "share of the picture that a subject covers:"
        order = [*(f"under {limit:.0%}" for limit in _AREAS), "more"]
        yield from (f"  {name}: {found.areas[name]}" for name in order if found.areas[name])
    yield "references are cut out by:"
    yield from _table(found.origins)
    yield from _captions(found)
    yield from (f"{what}: {count}" for what, count in found.odd.most_common())
    strays = [stray for _, scan in index.scans for stray in scan.strays]
    if strays:
        count = sum(scan.stray_count for _, scan in index.scans)
        yield f"files of no sample: {count}, such as {', '.join(strays[:3])}"
    for name, count in found.unknown.most_common(SHOWN):
        yield f"unknown part {name}: {count}; {parts.advice(name)}"
    yield f"corrupt: {len(found.bad)}"
    yield from (f"  {text}" for text in found.bad[:SHOWN])


def _captions(found: Findings) -> Iterator[str]:
    if _tokenizer() is None:
        yield "caption lengths: not counted, which needs open_clip: pip install open_clip_torch"
        return
    lengths = sorted(found.captions.elements())
    if lengths:
        cut = sum(length > _CONTEXT for length in lengths)
        yield (
            f"caption lengths: {lengths[len(lengths) // 2]} tokens in the middle, {lengths[-1]} at "
            f"most; {cut} over {_CONTEXT}, which lose their end"
        )


def _table(counts: Counter[str]) -> Iterator[str]:
    yield from (f"  {name}: {count}" for name, count in counts.most_common(SHOWN))
    if len(counts) > SHOWN:
        yield f"  and {len(counts) - SHOWN} more"
