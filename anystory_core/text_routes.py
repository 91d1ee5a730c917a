"""Routes without a trained router: the words of a label find its subject.

The U-Net's own cross-attention knows where a word belongs. With ``q`` the query of block l, ``k``
its key map (``attn2.to_k``, LoRAs included) of text states, and C = N + 1 candidates of which the
last is the background (the prompt's start and padding tokens, which name nothing):

    s_i(u) = mean over heads of max over i's tokens t of <q_u, k_t> / sqrt(d_head)
    p_i(u) = softmax over i of s_i(u) / temperature

One block at one step is noisy, so the map that routes is a running mean over the sequence of blocks
and steps, on the finest token grid that has occurred (bilinear up, area average back down):

    m <- m + (p - m) / min(n, window),    n = blocks seen so far in this run

It is the plain mean of all that was seen until ``window`` blocks have passed (one whole U-Net by
default), and from then on forgets with that time constant, so it follows a subject that moves
during the first steps. The first block of a step starts from what the step before has found. No
second pass through the U-Net is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import RoutingError
from .routes import Crops, Grid, MaskRoutes, SoftMaps, resize_soft
from .sites import Site

KeyMap = Callable[[Site, Tensor], Tensor]  # a block's attn2.to_k: (1,T,C) -> (1,T,D)


@dataclass(frozen=True)
class Texts:
    """Text states of the candidates, and the maps that make keys of them.

    labels: one (T_i,C) per subject, its own tokens only; background (T,C): start and padding."""

    labels: tuple[Tensor, ...]
    background: Tensor
    keys: KeyMap

    def __post_init__(self) -> None:
        for number, states in enumerate((*self.labels, self.background), 1):
            if states.ndim != 2 or states.shape[0] == 0:
                raise RoutingError(
                    f"text: candidate {number} has states of shape {tuple(states.shape)}, expected "
                    "(tokens, width) with at least one token; is its label empty?"
                )


@dataclass
class _Memory:
    """The running mean of one kind of call."""

    soft: SoftMaps
    count: int


@dataclass(frozen=True)
class TextRoutes:
    """Routes of one sampling run by the labels' words.

    temperature: above 1 softens the map of a block before it enters the mean. window: blocks that
    the mean remembers. centre: take from every candidate's score its mean over the picture, so that
    a token that draws attention everywhere does not outweigh the others everywhere. masks forbid
    subject i where mask_i < 0.5.
    """

    texts: Texts
    window: int
    temperature: float = 1.0
    centre: bool = False
    masks: MaskRoutes | None = None
    _keys: dict[int, Tensor] = field(default_factory=dict[int, Tensor], repr=False)
    _memory: dict[tuple[Crops, int, int], _Memory] = field(
        default_factory=dict[tuple[Crops, int, int], _Memory], repr=False
    )

    def __post_init__(self) -> None:
        if self.window < 1:
            raise RoutingError(f"window: got {self.window}, expected 1 block or more")
        if not self.temperature > 0:
            raise RoutingError(f"temperature: got {self.temperature}, expected more than 0")

    @property
    def candidates(self) -> int:
        """N + 1."""
        return len(self.texts.labels) + 1

    def maps_of_query(
        self, site: Site, q: Tensor, grid: Grid, crops: Crops, *, conditional: int
    ) -> SoftMaps:
        """q (B,Q,D): the attn2 query of the block; its first ``conditional`` rows are conditional.

        Calls of one kind (as many rows of each role, the same crops) share a running mean."""
        scores = self.scores(site, q)
        if self.masks is not None:
            allowed = self.masks.allowed(grid, crops, q.device)
            scores = scores.masked_fill(~allowed, -torch.inf)
        fresh = SoftMaps((scores / self.temperature).softmax(dim=1), grid)
        return self.resize(
            self._remember(fresh, (tuple(crops), conditional, q.shape[0])), grid, crops
        )

    def scores(self, site: Site, q: Tensor) -> Tensor:
        """s (B,C,Q) float32 of one block."""
        parts = (*self.texts.labels, self.texts.background)
        if site.index not in self._keys:
            states = torch.cat(parts)[None].to(q)
            self._keys[site.index] = self.texts.keys(site, states)[0]
        keys = self._keys[site.index].to(q)  # (T,D), all candidates' tokens in a row
        q = q.reshape(*q.shape[:2], site.heads, -1).transpose(1, 2)  # (B,H,Q,d)
        keys = keys.reshape(keys.shape[0], site.heads, -1).permute(1, 2, 0)  # (H,d,T)
        logits = torch.matmul(q, keys).float() / q.shape[-1] ** 0.5  # (B,H,Q,T)
        sizes = [part.shape[0] for part in parts]
        best = [x.amax(dim=-1).mean(dim=1) for x in torch.split(logits, sizes, dim=-1)]
        scores = torch.stack(best, dim=1)  # (B,C,Q)
        if self.centre:
            scores = scores - scores.mean(dim=-1, keepdim=True)
        return scores

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        """The same maps on another grid, inside the masks there: resizing blurs their borders."""
        resized = resize_soft(soft, grid)
        return resized if self.masks is None else self.masks.confine(resized, crops)

    def _remember(self, fresh: SoftMaps, kind: tuple[Crops, int, int]) -> SoftMaps:
        """Take a block's map into the running mean and return it, on the finest grid so far."""
        memory = self._memory.get(kind)
        if memory is None:
            memory = self._memory[kind] = _Memory(fresh, 1)
            return memory.soft
        finest = max(memory.soft.grid, fresh.grid, key=lambda g: g[0] * g[1])
        mean, new = resize_soft(memory.soft, finest).maps, resize_soft(fresh, finest).maps
        memory.count += 1
        step = 1 / min(memory.count, self.window)
        memory.soft = SoftMaps(torch.lerp(mean, new.to(mean), step), finest)
        return memory.soft
