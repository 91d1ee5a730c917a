"""The passes of any base model in one sampling run: which rows of a call are conditional, which
part of which picture they show, and which of them are recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...anystory_core.errors import RoutingError
from ...anystory_core.routing.grids import Crop
from ...anystory_core.routing.record import CallRecorder, RoutingRecord
from .base import Entry
from .conds import Evaluation, Roles, rows_of, window_rows
from .ids import EVALUATION_KEY


@dataclass(frozen=True)
class CondRows:
    """The rows of one cond in a call. ``views``: what each row shows; None: all of the one picture
    that there is. ``apart``: the cond is for a part of the picture."""

    number: int  # of the list of conds
    uuid: Any
    conditional: bool
    rows: tuple[int, ...]
    crop: Crop | None
    views: tuple[Crop | None, ...]
    apart: bool


@dataclass(kw_only=True)
class RunPasses:
    """What all bases share of :class:`.base.Passes`."""

    record: RoutingRecord
    roles: Roles
    batch: Tensor | None = None  # (B,C,h,w) that this evaluation of the model is about
    seen: set[int] = field(default_factory=set[int])  # its rows that were recorded

    def __deepcopy__(self, memo: dict[int, Any]) -> RunPasses:
        return self  # in the options, which other packs copy

    def prepare_sampling(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The host's own plan."""
        return executor(*args, **kwargs)

    def predict_noise(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the guided model; each row is recorded from its first call."""
        self.batch, self.seen = args[0] if args else kwargs["x"], set()
        return executor(*args, **kwargs)

    def calc_cond_batch(
        self,
        executor: Callable[..., Any],
        model: Any,
        conds: list[Any],
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any],
    ) -> Any:
        """Tells the calls inside which ``conds`` index is conditional. ``cond_or_uncond`` alone
        does not: SAG runs the negative as number 0, DualCFG has two positives."""
        options = dict(model_options.get("transformer_options", {}))
        rows = window_rows(options, x)
        if not rows:
            rows = range(x.shape[0]) if self.batch is None else rows_of(x, self.batch, self.seen)
        options[EVALUATION_KEY] = Evaluation.of(self.roles, conds, x, timestep, rows)
        return executor(
            model, conds, x, timestep, {**model_options, "transformer_options": options}
        )

    def evaluation(self, options: dict[str, Any]) -> Evaluation:
        """The one that a call is part of."""
        if EVALUATION_KEY in options:
            return options[EVALUATION_KEY]
        return Evaluation(
            recorded=(0, self.roles.first_positive), rows=tuple(range(self.record.rows))
        )

    def sigma(self, options: dict[str, Any]) -> float:
        """The noise level of a call. To read it waits for the device, so it is read once for all
        calls of an evaluation."""
        levels, evaluation = options["sigmas"], self.evaluation(options)
        return evaluation.sigma if levels is evaluation.timestep else float(levels[0])

    def conds_of(self, options: dict[str, Any], x: Tensor, pictures: int) -> list[CondRows]:
        """The conds of a call with latent ``x``, in its order. ``pictures``: how many of a batch
        have masks of their own. RoutingError where these are several and nobody knows which ones
        the call shows."""
        evaluation = self.evaluation(options)
        chunks: list[int] = options["cond_or_uncond"]
        uuids: list[Any] = options.get("uuids", [None] * len(chunks))
        size, times = evaluation.layout(len(chunks), x)
        found: list[CondRows] = []
        for place, (number, uuid) in enumerate(zip(chunks, uuids, strict=True)):
            firsts = range(place * size, times * size * len(chunks), size * len(chunks))
            crop = evaluation.crop(uuid, x)
            views: list[Crop | None] = [crop] * size
            if pictures > 1:
                views = self._views(evaluation, crop, size, x)
            found.append(
                CondRows(
                    number,
                    uuid,
                    evaluation.is_cond(number),
                    tuple(row for first in firsts for row in range(first, first + size)),
                    crop,
                    tuple(views * times),
                    crop is not None or uuid in evaluation.masked,
                )
            )
        return found

    def _views(
        self, evaluation: Evaluation, crop: Crop | None, size: int, x: Tensor
    ) -> list[Crop | None]:
        """What each of the ``size`` rows of a cond shows, its picture's number included."""
        numbers = evaluation.rows
        if len(numbers) != size:
            raise RoutingError(
                f"masks: each picture of the batch has its own, but another node draws {size} of "
                f"{self.record.rows} pictures at once and does not say which; give each subject "
                "one mask for all"
            )
        return [evaluation.view(crop, number, x) for number in numbers]

    def recording(
        self,
        options: dict[str, Any],
        x: Tensor,
        conds: Sequence[CondRows],
        entry: Entry,
        active: Sequence[bool],
    ) -> tuple[CallRecorder, tuple[int, ...]] | None:
        """Where a call files its routes, and which of its rows; None: it shows nothing new of what
        is recorded. ``active``: the subjects inside their windows."""
        evaluation = self.evaluation(options)
        recorded: dict[int, int] = {}  # row of the batch -> row of this call
        for cond in conds:
            if cond.uuid is None or (cond.number, cond.uuid) != evaluation.recorded:
                continue
            size, _ = evaluation.layout(len(conds), x)
            if evaluation.is_tile(cond.crop, x):
                self.record.tiled = True  # its routes are not the picture's
            elif len(evaluation.rows) == size:
                shown = zip(evaluation.rows, cond.rows[:size], strict=True)
                passed = self.seen - entry.recorded
                recorded = {row: place for row, place in shown if row not in passed}
        if not recorded:
            return None
        entry.recorded.update(recorded)
        if self.batch is not None:
            self.seen.update(recorded)
        recorder = self.record.call(self.sigma(options), active, tuple(recorded))
        return recorder, tuple(recorded.values())
