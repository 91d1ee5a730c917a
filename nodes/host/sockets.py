"""What goes over the pack's own sockets: a routing, and the recorded runs of a model.

(ANYSTORY is :class:`.managed.ManagedAnyStory`, ANYSTORY_SUBJECT the core's ``EncodedSubject``.)"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ...anystory_core.routing.record import RoutingRecord
from ...anystory_core.subject.subject import EncodedSubject
from ...anystory_core.weights.fingerprint import latent_fingerprint
from .managed import ManagedAnyStory

MOST_BYTES = 512 * 2**20  # 25 steps of SDXL at 1024 squared are about 3 MB a picture
LEAST_SHARE = 0.01  # of a composed latent that a run must have given
# Of a latent's spread: what rounding on the way through another sampler may change. By chance the
# four channels of one place are as near as that once in 10^9.
ROUNDING = 0.01


@dataclass(frozen=True)
class Routing:
    """The ANYSTORY_ROUTING socket: who, and where by which rule."""

    anystory: ManagedAnyStory
    subjects: tuple[EncodedSubject, ...]
    masks: tuple[Tensor | None, ...]
    mode: str
    labels: tuple[Tensor, ...] = ()  # text states of the labels, for the modes with text
    agree: bool = False  # in the mode "learned": the blocks decide together who is where
    text_block: int = 0  # in the modes with text: number of the block that speaks; 0: all

    def get_models(self) -> list[Any]:
        """What the host may count and free with this output."""
        return self.anystory.get_models()


@dataclass(frozen=True, eq=False)
class Kept:
    """One finished run: its record, the latent (B,C,h,w) float16 that it returned, and which node
    sampled in which prompt."""

    record: RoutingRecord
    latent: Tensor
    prompt: str | None
    node: str | None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.record.size + self.latent.numel() * self.latent.element_size()


@dataclass(frozen=True)
class Found:
    """What is known of one picture of a latent batch: a run, or None, and the row of its batch.
    ``note`` says what is missing."""

    record: RoutingRecord | None
    row: int = 0
    note: str = ""


_UNKNOWN = Found(
    None,
    note="No recorded run returned this latent. Connect the LATENT of the sampler that uses this "
    "Apply AnyStory's model; if it is connected, the sampler's result came from the host's cache, "
    "which no longer has its routes: change the seed, or clear the cache.",
)


@dataclass
class RoutingMaps:
    """The ANYSTORY_MAPS socket: the runs of one ApplyAnyStory, as far as MOST_BYTES go.

    The host keeps each sampler's last result, so runs that their node has repeated in a later
    prompt give way first, then the oldest."""

    keep_soft: bool = False
    unrouted: bool = False  # the router has no subject: sampling is the host's own
    runs: list[Kept] = field(default_factory=list[Kept])
    _rows: dict[str, tuple[Kept, int]] = field(default_factory=dict[str, tuple[Kept, int]])
    _gone: deque[str] = field(default_factory=lambda: deque(maxlen=4096))  # what gave way

    def file(self, latents: Sequence[Tensor], record: RoutingRecord) -> None:
        """Keep a finished run under the latents (B,C,h,w) that may be asked for: the sampler's
        result first, then others that it gives, as the last denoised one."""
        context = get_executing_context()
        prompt, node = (None, None) if context is None else (context.prompt_id, context.node_id)
        kept = Kept(record, latents[0].detach().to("cpu", torch.float16), prompt, node)
        self.runs.append(kept)
        for latent in latents:
            for row, name in enumerate(map(latent_fingerprint, latent)):
                self._rows[name] = (kept, row)
        known = {id(run) for run, _ in self._rows.values()}
        self.runs = [run for run in self.runs if id(run) in known]  # the same latent once more
        size = sum(run.size for run in self.runs)
        while size > MOST_BYTES and len(self.runs) > 1:
            first = next(filter(self._repeated, self.runs), self.runs[0])
            size -= first.size
            self._drop(first)

    def find(self, latent: Tensor, picture: int = 0) -> Found:
        """The run that gave picture ``picture`` of a latent batch (B,C,h,w), whole or in part."""
        if self.unrouted:
            return Found(RoutingRecord((), (), idle=True))
        own = latent[picture : picture + 1]
        name = latent_fingerprint(own)
        if name in self._rows:
            kept, row = self._rows[name]
            return Found(kept.record, row)
        if name in self._gone:
            return Found(
                None,
                note="The routes of this run gave way to those of later ones, of which "
                f"{MOST_BYTES // 2**20} MB are kept: queue fewer pictures at once, or smaller "
                "ones.",
            )
        return self._composed(own) or self._last_of_prompt(own, picture) or _UNKNOWN

    def _composed(self, own: Tensor) -> Found | None:
        """The run that gave most of a latent (1,C,h,w) which nodes have put together."""
        whole = own[0].detach().to("cpu", torch.float32)
        near = ROUNDING * float(whole.std())
        shares = [
            (float(((whole - latent).abs() <= near).all(dim=0).float().mean()), kept, row)
            for kept in reversed(self.runs)
            if kept.latent.shape[1:] == whole.shape
            for row, latent in enumerate(kept.latent)
        ]
        share, kept, row = max(shares, key=lambda each: each[0], default=(0.0, None, 0))
        if kept is None or share < LEAST_SHARE:
            return None
        note = (
            f"This latent was put together after sampling. {100 * share:.0f} % of it are from the "
            "run whose routes are shown; those of the rest are missing."
        )
        return Found(kept.record, row, note)

    def _last_of_prompt(self, own: Tensor, picture: int) -> Found | None:
        """The last run of the prompt that runs now, where its pictures have the latent's shape."""
        context = get_executing_context()
        prompt = None if context is None else context.prompt_id
        height, width = own.shape[-2:]
        for kept in reversed(self.runs):
            rows, _, high, wide = kept.latent.shape
            if kept.prompt == prompt and high * width == wide * height:
                note = (
                    "Another node changed this latent after sampling, so no recorded run returned "
                    "it. Shown are the routes of the last run of this prompt."
                )
                return Found(kept.record, min(picture, rows - 1), note)
        return None

    def _repeated(self, run: Kept) -> bool:
        """Whether its node has sampled in a later prompt, so that the host keeps another result."""
        later = self.runs[self.runs.index(run) + 1 :]
        return run.node is not None and any(
            other.node == run.node and other.prompt != run.prompt for other in later
        )

    def _drop(self, run: Kept) -> None:
        self.runs.remove(run)
        for name in [name for name, (kept, _) in self._rows.items() if kept is run]:
            del self._rows[name]
            self._gone.append(name)
