"""Which base model a weights file is for."""

from __future__ import annotations

from .host.base import HostBase
from .host.managed import ManagedAnyStory
from .host.sdxl.base import SDXLBase


def base_of(anystory: ManagedAnyStory) -> HostBase:
    """The host's side of the base of these weights."""
    return SDXLBase()
