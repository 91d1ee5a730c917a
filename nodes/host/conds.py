"""What the conds of a guider are: conditional or not, on which area, and which one is recorded."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...anystory_core.routing.grids import Crop

COMPARED = 256  # values of a row that tell it from the others

Entries = Sequence[Mapping[str, Any]]  # one list of conds


def is_hooked(guider: Any) -> bool:
    """Whether conds of a guider bring weights of their own (LoRA hooks)."""
    return any("hooks" in entry for entries in guider.conds.values() for entry in entries)


@dataclass(frozen=True)
class Roles:
    """Read from a guider before it samples. A list named like "negative" is unconditional (PerpNeg
    has two of them); all others are conditional."""

    of_cond: Mapping[Any, str]  # uuid -> "cond" or "uncond"
    first_positive: Any  # uuid of the cond that begins the list whose routes are recorded

    @classmethod
    def of(cls, guider: Any) -> Roles:
        roles: dict[Any, str] = {}
        first: Any = None
        for name, entries in guider.conds.items():
            role = "uncond" if "negative" in name or "uncond" in name else "cond"
            for entry in entries:
                roles[entry["uuid"]] = role
                if first is None and role == "cond":
                    first = entry["uuid"]
        return cls(roles, first)

    def of_list(self, number: int, entries: Entries | None) -> str:
        """Role of list ``number`` of an evaluation."""
        for entry in entries or ():
            role = self.of_cond.get(entry.get("uuid"))
            if role is not None:
                return role
        return "uncond" if number else "cond"

    def recorded(self, conds: Sequence[Entries | None]) -> int:
        """Number of the list that begins with the first positive cond, -1 when none does. The uuid
        alone does not tell: the host gives every list that has no cond of the same area a copy,
        uuid included, behind the list's own."""
        for number, entries in enumerate(conds):
            if entries and entries[0].get("uuid") == self.first_positive:
                return number
        return -1


def _first_active(entries: Entries, now: float) -> Any:
    """uuid of the first cond that the host runs at this noise level; None when there is none.
    Prompts that take turns are conds with time ranges."""
    for entry in entries:
        if now <= entry.get("timestep_start", now) and now >= entry.get("timestep_end", now):
            return entry.get("uuid")
    return None


@dataclass(frozen=True)
class Areas:
    """Where on the latent each cond of one evaluation acts (area conditioning)."""

    size: tuple[int, int]
    of_cond: Mapping[Any, Sequence[tuple[int, ...]]]  # uuid -> (height, width, y, x), latent pixels

    @classmethod
    def of(cls, conds: Sequence[Entries | None], x: Tensor) -> Areas | None:
        """None when no cond has an area."""
        found: dict[Any, list[tuple[int, ...]]] = {}
        for entry in (entry for entries in conds for entry in entries or ()):
            if "area" in entry:
                found.setdefault(entry.get("uuid"), []).append(tuple(entry["area"]))
        return cls((x.shape[-2], x.shape[-1]), found) if found else None

    def crop(self, uuid: Any, x: Tensor) -> Crop | None:
        """The part that a call with latent ``x`` shows; the host cuts areas at the border."""
        for height, width, top, left in self.of_cond.get(uuid, ()):
            part = min(height, self.size[0] - top), min(width, self.size[1] - left)
            if part == (x.shape[-2], x.shape[-1]) and part != self.size:
                return Crop(top, left, *part, *self.size)
        return None


@dataclass(frozen=True)
class Evaluation:
    """The lists of conds of one evaluation of the model; calls name them by number."""

    roles: tuple[str, ...] = ()
    recorded: tuple[int, Any] = (0, None)  # number of a list, and uuid of its cond
    areas: Areas | None = None
    masked: frozenset[Any] = frozenset()  # uuids of conds that act inside a mask
    latent: tuple[int, int, int] | None = None  # batch size, height and width; None: unknown
    rows: tuple[int, ...] = ()  # of the run's batch, those that the latent shows; none: unknown
    # (B,) noise levels, on the device; the same for all rows
    timestep: Tensor | None = field(default=None, compare=False, repr=False)
    sigma: float = math.nan  # that level
    shown: set[Any] = field(default_factory=set, compare=False)  # kinds of the calls so far

    @classmethod
    def of(
        cls,
        roles: Roles,
        conds: Sequence[Entries | None],
        x: Tensor,
        timestep: Tensor,
        rows: Sequence[int] = (),
    ) -> Evaluation:
        number, sigma = roles.recorded(conds), float(timestep[0])
        entries = (conds[number] if number >= 0 else None) or ()
        return cls(
            tuple(roles.of_list(i, each) for i, each in enumerate(conds)),
            (number, _first_active(entries, sigma)),
            Areas.of(conds, x),
            frozenset(
                entry.get("uuid") for each in conds for entry in each or () if "mask" in entry
            ),
            (x.shape[0], x.shape[-2], x.shape[-1]),
            tuple(rows),
            timestep,
            sigma,
        )

    def is_cond(self, number: int) -> bool:
        """List 0 is conditional and the others are not, where nobody has said."""
        return self.roles[number] == "cond" if number < len(self.roles) else number == 0

    def crop(self, uuid: Any, x: Tensor) -> Crop | None:
        """The part of the latent that a cond's rows show; None: all of it."""
        return None if self.areas is None else self.areas.crop(uuid, x)

    def view(self, crop: Crop | None, picture: int, x: Tensor) -> Crop:
        """What a row of latent ``x`` shows, its picture's number included."""
        if crop is None:
            height, width = x.shape[-2:]
            crop = Crop(0, 0, height, width, height, width)
        return replace(crop, picture=picture)

    def layout(self, conds: int, x: Tensor) -> tuple[int, int]:
        """Rows of each of the ``conds`` in a call with latent ``x``, and how many times they all
        follow one another: packs that draw tiles stack them so, each with the rows of all conds."""
        rows = x.shape[0]
        if self.latent is not None:
            period = self.latent[0] * conds
            if rows > period and rows % period == 0:
                return self.latent[0], rows // period
        return rows // conds, 1

    def is_tile(self, crop: Crop | None, x: Tensor) -> bool:
        """Whether ``x`` is less than the cond's part of the latent: another pack draws in tiles,
        and nobody knows which one this is."""
        if self.latent is None or crop is not None:
            return False
        return x.shape[-2] < self.latent[1] or x.shape[-1] < self.latent[2]

    def kind(self, routed: Sequence[tuple[int, Any, Crop | None]], rows: int, x: Tensor) -> Any:
        """What a call shows, the same at every step: number, uuid and part of the conds that are
        routed, each with ``rows`` rows. None for tiles, for some rows of a batch, and for what this
        evaluation has shown before: nobody knows which tile or row it is."""
        whole = self.latent is None or rows == self.latent[0]
        if not whole or any(self.is_tile(crop, x) for _, _, crop in routed):
            return None
        kind = tuple(routed)
        if kind in self.shown:
            return None
        self.shown.add(kind)
        return kind


def rows_of(x: Tensor, batch: Tensor, seen: Collection[int]) -> tuple[int, ...]:
    """Which rows of ``batch`` (B,C,h,w) a part of it (b,C,h,w) holds: the host's context windows
    and other packs show the model some rows at a time. Among equal rows those not in ``seen`` come
    first. Empty when a row is none of the batch's."""
    if x.shape == batch.shape:
        return tuple(range(batch.shape[0]))
    if x.shape[1:] != batch.shape[1:]:
        return ()
    equal = (x.flatten(1)[:, None, :COMPARED] == batch.to(x).flatten(1)[None, :, :COMPARED]).all(-1)
    rows: list[int] = []
    for found in equal.tolist():
        free = [row for row, is_equal in enumerate(found) if is_equal and row not in rows]
        if not free:
            return ()
        rows.append(min(free, key=lambda row: (row in seen, row)))
    return tuple(rows)


def window_rows(options: Mapping[str, Any], x: Tensor) -> tuple[int, ...]:
    """Which rows of the batch the host's context window over it shows in latent ``x`` (b,C,h,w), as
    these transformer options have it; empty where none is open."""
    window = options.get("context_window")
    if window is None or getattr(window, "dim", None) != 0:
        return ()
    rows = tuple(window.index_list)
    return rows if len(rows) == x.shape[0] else ()
