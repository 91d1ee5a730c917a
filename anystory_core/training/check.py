"""``python -m anystory_core.training check DATA``: what training data holds, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .data import DataError, Index, decode

SHOWN = 10


def check(paths: Sequence[str]) -> tuple[str, bool]:
    """(report, all good?). Reads every sample."""
    index = Index.of(tuple(paths))
    kinds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    subjects: Counter[int] = Counter()
    bad: list[str] = []
    for entry in index.entries:
        try:
            raw = decode(entry)
        except DataError as error:
            bad.append(str(error))
            continue
        kinds[str(entry.kind)] += 1
        height, width = raw.target.shape[:2]
        sizes[f"{width}x{height}"] += 1
        subjects[len(raw.masks) if entry.kind == "scene" else 1] += 1
    lines = [f"{len(index)} samples"]
    lines += [f"  {kind}: {count}" for kind, count in kinds.most_common()]
    lines += ["picture sizes:"] + [f"  {s}: {c}" for s, c in sizes.most_common(SHOWN)]
    lines += ["subjects per sample:"] + [f"  {n}: {c}" for n, c in sorted(subjects.items())]
    lines.append(f"corrupt: {len(bad)}")
    lines += [f"  {text}" for text in bad[:SHOWN]]
    return "\n".join(lines), not bad
