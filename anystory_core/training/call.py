"""A forward pass of the U-Net in training: every block's maps are kept for the loss, and the route
of Eq. 5 is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..injection import equations
from ..injection.call import BlockRoute, Call
from ..injection.rows import take
from ..routing.grids import SoftMaps


@dataclass
class TrainingCall(Call):
    """A :class:`~..injection.call.Call` whose routes stay until its backward pass.

    ``gumbel`` (a seed per row, or empty): sigma in Eq. 5 is then the straight-through
    Gumbel-softmax, while Eq. 6-8 use the noise-free argmax. ``soft_maps`` has each block's maps and
    logits after the forward pass.
    """

    gumbel: tuple[int, ...] = ()
    soft_maps: dict[int, SoftMaps] = field(default_factory=dict[int, SoftMaps])
    _routes: dict[int, BlockRoute] = field(default_factory=dict[int, BlockRoute])
    _drawn: dict[int, Tensor] = field(default_factory=dict[int, Tensor])  # one-hot (b,C,Q)

    def _set_route(self, index: int, soft: SoftMaps) -> None:
        super()._set_route(index, soft)
        self._routes[index] = BlockRoute.of(index, soft)
        if self.gumbel and soft.logits is not None:
            seeds = [self.gumbel[row] * len(self.sites) + index for row in self._routed]
            self._drawn[index] = straight_through(soft.logits.refined, seeds)
        # Under activation checkpointing a block runs again in the backward pass; the first maps
        # are the ones that the loss has seen.
        self.soft_maps.setdefault(index, soft)

    def _route(self, index: int) -> BlockRoute | None:
        return self._routes.get(index)

    def cross_attention(self, index: int, q: Tensor, text: Tensor) -> Tensor:
        """Eq. 5 of q (B,Q,D) added to the text attention's output (B,Q,D), by the drawn route where
        there is one."""
        weights, cond = self._drawn.get(index), self.rows.cond
        if weights is None or not cond:
            return super().cross_attention(index, q, text)
        own, conditions = take(q, cond), self.prepared.conditions[index - 1].clip
        given = conditions.given([eta > 0 for eta in self._eta], own)
        attend = self._attend(index)
        term = equations.clip_dense(own, given, self._eta, weights[: len(cond)], attend)
        return self._added(index, text, cond, term)


def straight_through(logits: Tensor, seeds: Sequence[int]) -> Tensor:
    """Straight-through Gumbel-softmax (tau = 1) over candidates: (B,C,Q) -> one-hot weights whose
    gradient is that of the soft sample. Noise is a function of the row's seed alone, so it is the
    same when a block is recomputed, after a resume, and on any number of processes."""
    noise = torch.stack(
        [
            torch.rand(
                logits.shape[1:],
                generator=torch.Generator(logits.device).manual_seed(seed),
                device=logits.device,
                dtype=logits.dtype,
            )
            for seed in seeds
        ]
    )
    tiny = torch.finfo(logits.dtype).tiny
    exponential = (-torch.log(noise.clamp_min(tiny))).clamp_min(tiny)
    gumbel = -torch.log(exponential)
    soft = (logits + gumbel).softmax(dim=1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    return hard - soft.detach() + soft
