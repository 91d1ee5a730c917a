"""``python -m anystory_core.training check DATA``: what training data holds, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..errors import AnyStoryError
from ..subject.preprocess import cut_out
from .index import Index
from .schema import Raw, decode

SHOWN = 10


def check(paths: Sequence[str]) -> tuple[str, bool]:
    """(report, all good?). Reads every sample and cuts its references out, as a run does."""
    index = Index.of(tuple(paths))
    kinds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    subjects: Counter[int] = Counter()
    bad: list[str] = []
    for entry in index:
        try:
            raw = decode(entry)
            count = _cut_references(raw)
        except AnyStoryError as error:
            text = str(error)
            bad.append(text if text.startswith(entry.key) else f"{entry.key}: {text}")
            continue
        kinds[str(entry.kind)] += 1
        height, width = raw.target.shape[:2]
        sizes[f"{width}x{height}"] += 1
        subjects[count] += 1
    lines = [f"{len(index)} samples"]
    lines += [f"  {kind}: {count}" for kind, count in kinds.most_common()]
    lines += ["picture sizes:"] + [f"  {s}: {c}" for s, c in sizes.most_common(SHOWN)]
    lines += ["subjects per sample:"] + [f"  {n}: {c}" for n, c in sorted(subjects.items())]
    if subjects[0]:
        lines.append("  those of 0 are for stage 'router'; stage 'subject' counts them as corrupt")
    lines.append(f"corrupt: {len(bad)}")
    lines += [f"  {text}" for text in bad[:SHOWN]]
    return "\n".join(lines), not bad


def _cut_references(raw: Raw) -> int:
    """How many subjects a sample has; AnyStoryError when one cannot be cut out."""
    if raw.reference is not None:
        cut_out(raw.reference, raw.reference_mask)
        return 1
    for mask in raw.masks:
        cut_out(raw.target, mask)
    return len(raw.masks)
