"""A progress bar, where there is tqdm."""

from __future__ import annotations

import importlib
from typing import Any


class _Silent:
    """In place of tqdm's bar where that is not installed."""

    def update(self, n: int = 1) -> None: ...

    def set_postfix_str(self, s: str = "") -> None: ...

    def close(self) -> None: ...


def bar(what: str, total: int, begun: int = 0) -> Any:
    """tqdm's bar of ``total`` items, of which ``begun`` are done."""
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm
    except ImportError:
        return _Silent()
    return tqdm(total=total, initial=begun, desc=what, unit=" items", mininterval=1.0)
