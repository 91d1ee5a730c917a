"""What a node says of its work, under its widgets."""

from __future__ import annotations

from collections.abc import Iterable


def say(lines: Iterable[str]) -> tuple[str, ...]:
    """``lines``, each once, for the ``text`` of a node's ``ui``: web/note.js shows them there,
    as text and never as HTML, until it runs again, and the history keeps them.

    Not the host's own message for text on a node: newer editors take it away when a job ends."""
    return tuple(dict.fromkeys(lines))
