"""Labels of subjects: one line of what can be read, in any script."""

from __future__ import annotations

import unicodedata

from .subject import UNNAMED

MOST_LETTERS = 60
_JOINER = "\u200d"
_JOINERS = {"\u200c", _JOINER}  # between letters of Persian and many others, and in emoji


def is_joiner(character: str) -> bool:
    """A sign without a picture that says how its neighbours join: zero-width joiners, variation
    selectors, and the tags of flags."""
    return (
        character in _JOINERS
        or "\ufe00" <= character <= "\ufe0f"
        or "\U000e0020" <= character <= "\U000e007f"
    )


def clean_label(label: str) -> str:
    """Printable, one line, at most MOST_LETTERS characters; ``UNNAMED`` when nothing is left."""
    kept = (c if c.isprintable() or is_joiner(c) else " " for c in label)
    text = " ".join("".join(kept).split())
    end = MOST_LETTERS
    while end and end < len(text) and _joined(text[end - 1], text[end]):
        end -= 1  # what belongs together stays or goes together
    text = text[:end].strip(" " + "".join(_JOINERS))
    return text if any(not is_joiner(c) for c in text) else UNNAMED


def _joined(before: str, after: str) -> bool:
    return before == _JOINER or is_joiner(after) or unicodedata.combining(after) > 0
