"""What a base model must bring to the host's side; ``nodes/bases.py`` knows which a file is for.

The rest of this folder serves every base, and imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from comfy.patcher_extension import WrapperExecutor

from ...anystory_core.injection.prepare import PreparedSubjects, Settings
from ...anystory_core.routing.record import RoutingRecord
from .managed import ManagedAnyStory
from .sockets import Routing
from .windows import Window


@dataclass
class Kept:
    """What the runs of one node share, if they differ in the latent and the masks alone."""

    prepared: PreparedSubjects | None = None  # None before the first of them


@dataclass(frozen=True)
class RunRequest:
    """What one sampling run asks of a base. Its routes go into ``record``; ``advance`` is told of
    both parts of the preparations. ``kept``: what an earlier run has prepared is taken over."""

    guider: Any
    routing: Routing
    settings: Settings
    windows: tuple[Window, ...]  # one per subject
    record: RoutingRecord
    advance: Callable[[int], None]
    kept: Kept | None = None


@dataclass
class Entry:
    """One call into the diffusion model. Other packs' wrappers may make several passes of it
    (reference-only control), of which the last one is the picture's."""

    passes: int = 0  # that have begun
    recorded: set[int] = field(default_factory=set[int])  # rows, by each pass over the one before
    kind: Any = None  # of what the passes show


class Passes(Protocol):
    """A prepared run: all passes of the model in it. Each method is a wrapper in the host's form,
    and runs as the innermost of its kind (:mod:`.handover`)."""

    record: RoutingRecord

    def predict_noise(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the guided model."""
        ...

    def calc_cond_batch(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the model under several lists of conds."""
        ...

    def diffusion_model(
        self, executor: WrapperExecutor, entry: Entry, *args: Any, **kwargs: Any
    ) -> Any:
        """One pass of the diffusion model, in a call that ``entry`` tells of."""
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
