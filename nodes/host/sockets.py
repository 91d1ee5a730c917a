"""What goes over the pack's own sockets: a routing, and the recorded runs of a model.

(ANYSTORY is :class:`.managed.ManagedAnyStory`, ANYSTORY_SUBJECT the core's ``EncodedSubject``.)"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from comfy_execution.utils import get_executing_context
from torch import Tensor

from ...anystory_core.errors import RoutingError
from ...anystory_core.routing.record import RoutingRecord
from ...anystory_core.subject.subject import EncodedSubject
from ...anystory_core.weights.fingerprint import latent_fingerprint
from .managed import ManagedAnyStory

KEPT_RUNS = 4  # of earlier prompts, with those of the present one
MOST_BYTES = 512 * 2**20  # 25 steps of SDXL at 1024 squared are about 3 MB a picture


@dataclass(frozen=True)
class Routing:
    """The ANYSTORY_ROUTING socket: who, and where by which rule."""

    anystory: ManagedAnyStory
    subjects: tuple[EncodedSubject, ...]
    masks: tuple[Tensor | None, ...]
    mode: str
    labels: tuple[Tensor, ...] = ()  # text states of the labels, for the modes with text
    agree: bool = False  # in the mode "learned": the blocks decide together who is where

    def get_models(self) -> list[Any]:
        """What the host may count and free with this output."""
        return self.anystory.get_models()


@dataclass
class RoutingMaps:
    """The ANYSTORY_MAPS socket: the last runs of one ApplyAnyStory.

    The host samples a whole list before the first of its previews, so all runs of the present
    prompt are kept, as far as MOST_BYTES go; the next prompt's let them give way."""

    keep_soft: bool = False
    unrouted: bool = False  # the router has no subject: sampling is the host's own
    runs: dict[str, RoutingRecord] = field(default_factory=dict)
    _prompt: str | None = None  # the present one; None where the host names none
    _of_prompt: set[str] = field(default_factory=set)  # their keys
    _too_large: set[str] = field(default_factory=set)  # those that MOST_BYTES had no room for

    def file(self, latent: Tensor, record: RoutingRecord) -> None:
        """Keep a finished run under the latent that it returned; the oldest gives way."""
        key = latent_fingerprint(latent)
        context = get_executing_context()
        prompt = None if context is None else context.prompt_id
        if prompt is None or prompt != self._prompt:
            self._prompt, self._of_prompt, self._too_large = prompt, set(), set()
        self.runs.pop(key, None)
        self.runs[key] = record
        self._of_prompt.add(key)
        self._too_large.discard(key)
        while len(self.runs) > max(KEPT_RUNS, len(self._of_prompt)):
            del self.runs[next(iter(self.runs))]
        size = sum(run.size for run in self.runs.values())
        while size > MOST_BYTES and len(self.runs) > 1:
            oldest = next(iter(self.runs))
            size -= self.runs.pop(oldest).size
            if oldest in self._of_prompt:
                self._of_prompt.discard(oldest)
                self._too_large.add(oldest)

    def find(self, latent: Tensor) -> RoutingRecord:
        """The run that returned ``latent``."""
        if self.unrouted:
            return RoutingRecord((), (), idle=True)
        key = latent_fingerprint(latent)
        if key in self._too_large:
            raise RoutingError(
                f"latent: the routes of this run gave way to those of later ones, of which "
                f"{MOST_BYTES // 2**20} MB are kept; queue fewer pictures at once, or smaller ones"
            )
        record = self.runs.get(key)
        if record is None:
            raise RoutingError(
                "latent: no recorded run returned this latent. Connect the LATENT of the sampler "
                "that uses this ApplyAnyStory's model; if it is connected, the sampler's result "
                "came from the cache, which no longer has its routes: change the seed, or clear "
                "the host's execution cache and queue again"
            )
        return record
