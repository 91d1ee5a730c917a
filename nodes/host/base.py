"""What a base model must bring to the host's side; ``nodes/bases.py`` knows which a file is for.

The rest of this folder serves every base, and imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ...anystory_core.injection.prepare import Settings
from ...anystory_core.routing.record import RoutingRecord
from .managed import ManagedAnyStory
from .sockets import Routing
from .windows import Window


@dataclass(frozen=True)
class RunRequest:
    """What one sampling run asks of a base. Its routes go into ``record``; ``advance`` is told of
    both parts of the preparations."""

    guider: Any
    routing: Routing
    settings: Settings
    windows: tuple[Window, ...]  # one per subject
    record: RoutingRecord
    advance: Callable[[int], None]


class Passes(Protocol):
    """A prepared run: all passes of the model in it."""

    record: RoutingRecord

    def installed(self, before: dict[str, Any]) -> dict[str, Any]:
        """A copy of the guider's transformer options with this run's patches and wrappers."""
        ...


class HostBase(Protocol):
    """One base model in the host."""

    def check(self, model: Any, anystory: ManagedAnyStory) -> None:
        """ModelMismatchError unless the weights are for this ModelPatcher's model."""
        ...

    def prepare(self, request: RunRequest) -> Passes:
        """Prepare the subjects for a run, before the host loads the model. ModelMismatchError as
        :meth:`check`."""
        ...

    def empty_conditioning(self, anystory: ManagedAnyStory) -> list[Any]:
        """The host's CONDITIONING of an empty prompt, without its text encoder."""
        ...
