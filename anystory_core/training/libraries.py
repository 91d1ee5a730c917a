"""Training's libraries that come without types, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def library(name: str) -> Any:
    """The module ``name`` of a library that states no types."""
    return importlib.import_module(name)
