"""What a base model must bring to the host's side; ``nodes/bases.py`` knows which a file is for.

The rest of this folder serves every base, and imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ...anystory_core.injection.prepare import Settings
from ...anystory_core.routing.record import RoutingRecord
from ...anystory_core.subject.subject import EncodedSubject
from .managed import ManagedAnyStory
from .sockets import Routing


@dataclass(frozen=True)
class EncodeRequest:
    """Pictures of a subject, and the networks that see them. ``advance`` is told of all three parts
    of the work."""

    anystory: ManagedAnyStory
    clip_vision: Any
    vae: Any
    image: Tensor
    mask: Tensor | None
    invert_mask: bool
    mask_shows: str
    label: str  # as typed
    name: str  # the same, clean
    clip: Any
    advance: Callable[[int], None]


@dataclass(frozen=True)
class RunRequest:
    """What one sampling run asks of a base. Subjects act from the fraction ``start`` of the
    sampling to ``end``. Routes go into ``record``; ``advance`` is told of both parts of the
    preparations."""

    guider: Any
    routing: Routing
    settings: Settings
    start: float
    end: float
    sigmas: Tensor  # of the run, the last one included
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

    def describe(self, anystory: ManagedAnyStory) -> str:
        """One line on what a file holds and what it therefore cannot do."""
        ...

    def encode(self, request: EncodeRequest) -> tuple[EncodedSubject, tuple[str, ...]]:
        """Encode a subject; also what was assumed, in words for the user. ModelMismatchError: one
        of the networks is another than the weights expect."""
        ...

    def load_subject(self, path: Path, anystory: ManagedAnyStory) -> EncodedSubject:
        """Read a saved subject."""
        ...

    def check_routing(
        self,
        anystory: ManagedAnyStory,
        mode: str,
        subjects: Sequence[EncodedSubject],
        masks: Sequence[Tensor | None],
        clip: Any,
    ) -> tuple[Tensor, ...]:
        """The labels' text states, for the modes with text. RoutingError or ModelMismatchError
        unless the weights can route these subjects in this mode."""
        ...

    def routers(self, routing: Routing) -> list[Any]:
        """The patchers of the modules that route while the model samples."""
        ...

    def check(self, model: Any, anystory: ManagedAnyStory) -> None:
        """ModelMismatchError unless the weights are for this ModelPatcher's model."""
        ...

    def prepare(self, request: RunRequest) -> Passes | None:
        """Prepare the subjects for a run, before the host loads the model; None: nothing acts in
        it, and the model must run as if we were not there. ModelMismatchError as :meth:`check`."""
        ...

    def check_segmentation(self, anystory: ManagedAnyStory) -> None:
        """RoutingError unless :meth:`empty_conditioning` and the maps of the router can segment."""
        ...

    def empty_conditioning(self, anystory: ManagedAnyStory) -> list[Any]:
        """The host's CONDITIONING of an empty prompt, without its text encoder."""
        ...
