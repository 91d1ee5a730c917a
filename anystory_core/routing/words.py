"""Routes without a trained router: the words of a label find its subject.

The U-Net's own cross-attention knows where a word belongs. With ``q`` the query of block l, ``k``
its key map (``attn2.to_k``, LoRAs included) of the tokens t of subject i's label, and <x> the mean
of x over the picture's tokens u:

    s_t(u) = <q_u, k_t> / sqrt(d_head), for each head
    s_i(u) = log of the mean over heads of exp(max over t of (s_t(u) - <s_t>))

(so heads are averaged as attention weights are: one head that knows the place is not outvoted).
One block at one step is noisy, so what routes is a running mean over the sequence of blocks and
steps, on the finest token grid that has occurred (bilinear up, area average back down). A block
counts by its number of tokens, w_l = (smallest stride / its stride)^2:

    m <- m + (s - m) w_l / min(W, sum of all w),    W = sum of w_l seen so far in this run

It is the plain mean of all that was seen until one whole U-Net has passed, and from then on forgets
with that time constant, so it follows a subject that moves during the first steps. The first block
of a step starts from what the step before has found. The map of block l is then

    z_i(u) = (m_i(u) - <m_i>) / deviation of m_i over the picture
    p(u) = softmax over (z_1(u) ... z_N(u), THRESHOLD), the last for the background

Only how a word's score differs over the picture says where it belongs. Its level does not: in a
trained U-Net, SDXL's above all, some tokens draw attention everywhere, the start token most of all
(an attention sink), and beside it no word would win anywhere. A token that is the same everywhere
is no evidence after <s_t> is taken away, whether it stands in a label or not; and a start token
that is compared with nothing can outweigh nothing. The background is therefore no token but a
level, in deviations of the subject's own map. A subject that covers the share f of the picture
evenly has z = sqrt((1 - f) / f) there, more than the level up to f = 0.8. A picture, or a crop of
one, in which a subject is not at all gives it its best place nevertheless.

No second pass through the U-Net is made.

With one ``block`` chosen, it alone speaks: m is its latest score, and until it has run for the
first time the background has every place. Conceptrol (arXiv 2503.06568) takes an adapter's mask
from one block and names SDXL's 48th (``output 1.3``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..bases.base import Site
from ..errors import RoutingError
from .grids import Crops, Grid, SoftMaps, resize_soft
from .sources import MaskRoutes

KeyMap = Callable[[Site, Tensor], Tensor]  # a block's attn2.to_k: (1,T,C) -> (1,T,D)

THRESHOLD = 0.5  # of the background, in deviations
_FLAT = 1e-4  # the least deviation: below it is rounding


@dataclass(frozen=True)
class Texts:
    """Text states of the labels, one (T_i,C) per subject, its own tokens only; and the maps that
    make keys of them. ``constant``: those maps are the same in all calls, so that keys are made
    once."""

    labels: tuple[Tensor, ...]
    keys: KeyMap
    constant: bool = True

    def __post_init__(self) -> None:
        for number, states in enumerate(self.labels, 1):
            if states.ndim != 2 or states.shape[0] == 0:
                raise RoutingError(
                    f"text: subject {number} has states of shape {tuple(states.shape)}, expected "
                    "(tokens, width) with at least one token; is its label empty?"
                )


@dataclass
class Memory:
    """The running mean m of calls that show the same: ``mean`` (B,N,Q), None before the first
    block; ``weight`` is W. Both are never written into, so that a call that takes another's place
    can begin from where that one began."""

    mean: SoftMaps | None = None
    weight: float = 0.0
    _start: tuple[SoftMaps | None, float] = (None, 0.0)  # of the call that runs

    def begin(self, *, again: bool) -> Memory:
        """A call begins; ``again``: in place of the last one."""
        if again:
            self.mean, self.weight = self._start
        self._start = self.mean, self.weight
        return self


@dataclass(frozen=True)
class TextRoutes:
    """Routes of one sampling run by the labels' words; ``sites`` are all of the U-Net's. ``masks``
    forbid subject i where mask_i < 0.5. ``block``: number of the only one that speaks; 0: all."""

    texts: Texts
    sites: Sequence[Site]
    masks: MaskRoutes | None = None
    block: int = 0
    _keys: dict[int, Tensor] = field(default_factory=dict[int, Tensor], repr=False)
    _memories: dict[Hashable, Memory] = field(default_factory=dict[Hashable, Memory], repr=False)

    @property
    def candidates(self) -> int:
        """N + 1."""
        return len(self.texts.labels) + 1

    @property
    def pictures(self) -> int:
        """How many pictures of a batch have masks of their own; 1: all have the same or none."""
        return 1 if self.masks is None else self.masks.pictures

    def of_run(self, masks: MaskRoutes | None) -> TextRoutes:
        """The same words within other masks, which remember nothing yet."""
        return replace(self, masks=masks, _memories={})

    def memory(self, kind: Hashable | None, *, again: bool = False) -> Memory:
        """What all calls of one kind remember together, for the next of them; None: a new memory,
        for one call alone. ``again``: the next takes the place of the last."""
        if kind is None:
            return Memory()
        return self._memories.setdefault(kind, Memory()).begin(again=again)

    def maps_of_query(
        self, site: Site, q: Tensor, grid: Grid, crops: Crops, memory: Memory
    ) -> SoftMaps:
        """q (B,Q,D): the attn2 query of the block, whose scores go into ``memory``."""
        if self.block in (0, site.index):
            self._remember(site, SoftMaps(self.scores(site, q), grid), memory)
        mean = memory.mean
        if mean is None:
            nowhere = torch.zeros(q.shape[0], self.candidates, q.shape[1], device=q.device)
            nowhere[:, -1] = 1
            return SoftMaps(nowhere, grid)
        centred = _centred(mean.maps, dim=-1)
        z = centred / centred.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(_FLAT)
        z = torch.cat((z, torch.full_like(z[:, :1], THRESHOLD)), dim=1)
        return self.resize(SoftMaps(z.softmax(dim=1), mean.grid), grid, crops)

    def scores(self, site: Site, q: Tensor) -> Tensor:
        """s (B,N,Q) float32 of one block."""
        keys = self._keys_of(site, q).to(q)  # (T,D), all labels' tokens in a row
        q = q.reshape(*q.shape[:2], site.heads, -1).transpose(1, 2)  # (B,H,Q,d)
        keys = keys.reshape(keys.shape[0], site.heads, -1).permute(1, 2, 0)  # (H,d,T)
        logits = torch.matmul(q, keys).float() / q.shape[-1] ** 0.5  # (B,H,Q,T)
        sizes = [states.shape[0] for states in self.texts.labels]
        parts = torch.split(_centred(logits, dim=-2), sizes, dim=-1)
        best = torch.stack([x.amax(dim=-1) for x in parts], dim=1)  # (B,N,H,Q)
        return best.logsumexp(dim=2) - math.log(site.heads)

    def _keys_of(self, site: Site, q: Tensor) -> Tensor:
        if site.index in self._keys:
            return self._keys[site.index]
        # On the device of the labels, where the model is: q may be another device's.
        keys = self.texts.keys(site, torch.cat(self.texts.labels)[None].to(q.dtype))[0]
        if self.texts.constant:
            self._keys[site.index] = keys
        return keys

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        """The same maps on another grid, inside the masks there: resizing blurs their borders."""
        resized = resize_soft(soft, grid)
        return resized if self.masks is None else self.masks.confine(resized, crops)

    def _remember(self, site: Site, fresh: SoftMaps, memory: Memory) -> None:
        """Take a block's scores into the running mean, on the finest grid so far."""
        smallest = min(s.stride for s in self.sites)
        weights = {s.index: (smallest / s.stride) ** 2 for s in self.sites}
        weight = weights[site.index]
        memory.weight = min(memory.weight + weight, sum(weights.values()))
        if memory.mean is None or self.block:
            memory.mean = fresh
            return
        finest = max(memory.mean.grid, fresh.grid, key=lambda g: g[0] * g[1])
        mean, new = resize_soft(memory.mean, finest).maps, resize_soft(fresh, finest).maps
        memory.mean = SoftMaps(torch.lerp(mean.to(new), new, weight / memory.weight), finest)


def _centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim=dim, keepdim=True)
