"""Libraries that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import DataError


class SetupError(DataError):
    """A library or a model is missing: no item is to blame, and the next would fail as well."""


def library(module: str, package: str = "") -> Any:
    """An imported module; SetupError with the line that installs ``package`` when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        raise SetupError(f"this needs {name} ({error}): pip install {name}") from error
