"""What a base model must bring to the host's side; ``nodes/bases.py`` knows which a file is for.

The rest of this folder serves every base, and imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from comfy.patcher_extension import WrapperExecutor
from torch import Tensor

from ...anystory_core.injection.prepare import PreparedSubjects, Settings
from ...anystory_core.routing.masks import check_batch
from ...anystory_core.routing.record import RoutingRecord
from ...anystory_core.subject.subject import EncodedSubject
from .managed import ManagedAnyStory
from .sockets import Routing


@dataclass
class Kept:
    """What the runs of one node share, if they differ in the latent and the masks alone."""

    prepared: PreparedSubjects | None = None  # None before the first of them


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
    clip: Any
    advance: Callable[[int], None]


@dataclass(frozen=True)
class RunRequest:
    """What one sampling run asks of a base. Subjects act from the fraction ``start`` of the
    sampling to ``end``. Its routes go into ``record``; ``advance`` is told of both parts of the
    preparations. ``kept``: what an earlier run has prepared may be taken over."""

    guider: Any
    routing: Routing
    settings: Settings
    start: float
    end: float
    sigmas: Tensor  # of the run, the last one included
    record: RoutingRecord
    advance: Callable[[int], None]
    kept: Kept | None = None

    def check_masks(self) -> None:
        """RoutingError where masks that decide are of another batch than the run's."""
        if self.routing.mode.endswith("masks"):
            check_batch(self.routing.masks, self.record.rows)


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

    def prepare_sampling(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The host plans its memory, and loads the model."""
        ...

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
        text_block: int,
    ) -> tuple[Tensor, ...]:
        """The labels' text states, for the modes with text, in which block ``text_block`` alone
        counts (0: all). RoutingError or ModelMismatchError
        unless the weights can route these subjects in this mode."""
        ...

    def routers(self, routing: Routing) -> list[Any]:
        """The patchers of the modules that route while the model samples."""
        ...

    def check(self, model: Any, anystory: ManagedAnyStory, settings: Settings) -> None:
        """ModelMismatchError unless the weights are for this ModelPatcher's model; RoutingError:
        settings that this base does not know."""
        ...

    def prepare(self, request: RunRequest) -> Passes | None:
        """Prepare the subjects for a run, before the host loads the model; None: nothing acts in
        it, and the model must run as if we were not there. Errors as :meth:`check`."""
        ...

    def check_segmentation(self, anystory: ManagedAnyStory) -> None:
        """RoutingError unless the routes of these weights can segment a picture."""
        ...

    def empty_conditioning(self, anystory: ManagedAnyStory) -> list[Any]:
        """The host's CONDITIONING of an empty prompt, without its text encoder."""
        ...
