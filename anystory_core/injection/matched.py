"""References at the noise of the step that runs, read by the U-Net itself (no part of the paper).

Eq. 6 takes K_i and V_i from features of the clean picture, which maps must have learned to read.
Without trained ones, what a U-Net reads best is what it makes itself at that moment. So at each
noise level sigma the clean latents z_i of a subject's pictures are noised to it, as the model
noises its own,

    x_i = z_i + sigma n_i,    n_i standard normal, new for each level,

and go through the U-Net once with the subject's label as their text. The keys and values of block
l's self-attention over x_i's tokens are K_i and V_i of block l in Eq. 6; several pictures of a
subject lie side by side. They take the place of projected features
(:meth:`~.prepare.PreparedSubjects.with_references`), so Eq. 6-8 act on them by the same code, in
the same rows.

Text states of a label are optional: zero states stand for an empty prompt, as in SDXL's training.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bases.base import Site
from ..errors import RoutingError
from ..routing.grids import Grid, area_mean
from ..subject.subject import Subject
from .keys import Candidates, KeyValue

_LENGTH = 77  # tokens of an empty prompt


class ReferencesRead(Exception):
    """The last block has shown its keys; what the U-Net computes after it is not needed."""


def places_inside(inside: Tensor, grid: Grid) -> Tensor:
    """Numbers of the places of V grids, in a row, that are at least half inside the masks (V,h,w)
    in [0,1]; at least one of each mask, its fullest."""
    share = area_mean(inside.float(), grid).flatten(1)
    best = share.amax(dim=1, keepdim=True)
    kept = (share >= 0.5) | ((best < 0.5) & (share == best))
    return kept.flatten().nonzero()[:, 0]


@dataclass(frozen=True)
class Picture:
    """One picture of subject ``owner``: latent (4,h,w) at the U-Net's scale, its label's states
    (S,C) and pooled state (P,); None without one. ``inside`` (h,w) in [0,1]: only tokens there
    count; None: all."""

    owner: int
    latent: Tensor
    text: Tensor | None
    pooled: Tensor | None
    inside: Tensor | None


@dataclass
class ReferencePass:
    """Stands for a :class:`~.call.Call` while pictures go through the U-Net: changes nothing, keeps
    the keys and values of every block from the second on, and ends the pass at the last.

    ``found``: by block, those (1,g,D) of each picture."""

    pictures: Sequence[Picture]
    last: int
    found: dict[int, list[KeyValue]] = field(default_factory=dict[int, list[KeyValue]])

    @property
    def plain_rows(self) -> int:
        """As of a call; every row is read here."""
        return 0

    def begin_cross_attention(self, index: int, z: Tensor, grid: Grid) -> None:
        """No route."""

    def cross_attention(self, index: int, q: Tensor, text: Tensor) -> Tensor:
        """The text's attention alone."""
        return text

    def self_attention(self, index: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> None:
        """Keeps k and v (B,Q,D), a row for each picture. ReferencesRead at the last block."""
        if index > 1:
            self.found[index] = [
                self._kept(picture, k[row : row + 1], v[row : row + 1], grid)
                for row, picture in enumerate(self.pictures)
            ]
        if index == self.last:
            raise ReferencesRead

    def _kept(self, picture: Picture, k: Tensor, v: Tensor, grid: Grid) -> KeyValue:
        if picture.inside is None:
            return KeyValue(k, v)
        places = places_inside(picture.inside[None], grid).to(k.device)
        return KeyValue(k.index_select(1, places), v.index_select(1, places))


@dataclass(frozen=True)
class ReferenceInputs:
    """Clean latents (B,4,h,w) and noise of their shape, and the text of B pictures: states (B,S,C)
    and pooled (B,P)."""

    latents: Tensor
    noise: Tensor
    text: Tensor
    pooled: Tensor


# Sends pictures through the U-Net, noised to the level; the ReferencePass takes the place of a
# Call, and its ReferencesRead may come out.
Forward = Callable[[ReferenceInputs, ReferencePass], object]


@dataclass(frozen=True)
class MatchedReferences:
    """The pictures of a run's subjects. ``start``, ``end``: part of the sampling, 0 to 1, in which
    they act. Text states have ``text_width`` numbers, pooled ones ``pooled_width``."""

    pictures: tuple[Picture, ...]
    sites: Sequence[Site]
    subjects: int
    text_width: int
    pooled_width: int
    start: float = 0.0
    end: float = 1.0

    def read(self, sigma: float, forward: Forward, *, at_once: int) -> dict[int, Candidates]:
        """The references of all N + 1 candidates at a noise level, by block, from ``at_once``
        pictures in a pass. RoutingError: the U-Net did not show all its blocks."""
        found: dict[int, list[KeyValue]] = {}
        last = len(self.sites)
        for first in range(0, len(self.pictures), at_once):
            pictures = self.pictures[first : first + at_once]
            reading = ReferencePass(pictures, last)
            with contextlib.suppress(ReferencesRead):
                forward(self._inputs(pictures, first, sigma), reading)
            missing = [index for index in range(2, last + 1) if index not in reading.found]
            if missing:
                raise RoutingError(
                    f"references 'matched noise': {len(missing)} of {last - 1} blocks of the model "
                    f"did not show their keys, block {missing[0]} first (another node runs them in "
                    "its own way); take that node out, or choose other references"
                )
            for index, parts in reading.found.items():
                found.setdefault(index, []).extend(parts)
        owners = [picture.owner for picture in self.pictures]
        return {index: self._by_subject(owners, parts) for index, parts in found.items()}

    def _by_subject(self, owners: Sequence[int], parts: Sequence[KeyValue]) -> Candidates:
        candidates: list[KeyValue | None] = []
        for subject in range(self.subjects):
            own = [part for owner, part in zip(owners, parts, strict=True) if owner == subject]
            candidates.append(_side_by_side(own))
        return Candidates([*candidates, None])

    def _inputs(self, pictures: Sequence[Picture], first: int, sigma: float) -> ReferenceInputs:
        latents = torch.stack([picture.latent.float() for picture in pictures])
        places = range(first, first + len(pictures))
        noise = torch.stack([noise_of(place, sigma, latents[0]) for place in places])
        lengths = [p.text.shape[0] for p in pictures if p.text is not None]
        length = math.lcm(*lengths) if lengths else _LENGTH
        text = latents.new_zeros(len(pictures), length, self.text_width)
        pooled = latents.new_zeros(len(pictures), self.pooled_width)
        for row, picture in enumerate(pictures):
            if picture.text is not None:
                # Attention to repeated tokens is attention to them once.
                own = picture.text.to(text)
                text[row] = own.repeat(length // own.shape[0], 1)
            if picture.pooled is not None:
                pooled[row] = picture.pooled.to(pooled)
        return ReferenceInputs(latents, noise, text, pooled)


def _side_by_side(views: Sequence[KeyValue]) -> KeyValue | None:
    if len(views) < 2:
        return views[0] if views else None
    return KeyValue(torch.cat([v.k for v in views], dim=1), torch.cat([v.v for v in views], dim=1))


def noise_of(number: int, sigma: float, like: Tensor) -> Tensor:
    """Standard normal noise of picture ``number`` at a noise level: the same in every run."""
    # A generator on the CPU reads the lower 32 bits of its seed alone, which are 0 in many a float.
    make = torch.Generator().manual_seed(zlib.crc32(struct.pack("<dq", sigma, number)))
    return torch.randn(like.shape, generator=make).to(like)


def pictures_of(
    subjects: Sequence[Subject], acting: Sequence[bool], *, masked: bool
) -> tuple[Picture, ...]:
    """All pictures of the subjects that act; ``masked``: only what is inside their masks counts.
    RoutingError: a subject has no latents, or no mask where one is asked for."""
    pictures: list[Picture] = []
    for number, (subject, acts) in enumerate(zip(subjects, acting, strict=True)):
        if not acts:
            continue
        if subject.latents is None or (masked and subject.inside is None):
            raise RoutingError(
                f"references 'matched noise': subject {number + 1} ({subject.label!r}) was saved "
                "by an earlier version, without its latents; encode it again from its pictures, or "
                "choose other references"
            )
        for view, latent in enumerate(subject.latents):
            inside = subject.inside[view] if masked and subject.inside is not None else None
            pictures.append(Picture(number, latent, subject.text, subject.pooled, inside))
    return tuple(pictures)
