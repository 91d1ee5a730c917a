"""What a row of the evaluation is, and what rows are measured with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from anystory_core.mini.config import PICTURE_SIZE
from anystory_core.weights.fingerprint import weights_fingerprint
from anystory_core.weights.model import AnyStoryModel

from ..files.public import converted
from .judge import Judge
from .measures import Estimate
from .stack import Stack
from .tasks import Task

CONVERTED = "converted "  # begins the names of models that are made without training
WITHOUT_MODEL = ("base", "real")  # what a row may draw with that are no AnyStory weights

Answer = dict[str, Any]  # of one task, as JSON keeps it
Result = dict[str, Estimate]


def nothing_kept(name: str, tasks: Sequence[Task], pictures: Tensor) -> None:
    """Pictures of a row are not looked at."""


@dataclass
class Bench:
    """What rows are measured with: the networks under test, the trained models that are there, and
    who judges what was drawn of held-out subjects and of training ones. ``keep`` is given the
    pictures of a row that draws."""

    stack: Stack
    models: dict[str, AnyStoryModel]
    judge: Judge
    trained: Judge
    keep: Callable[[str, Sequence[Task], Tensor], None] = nothing_kept

    @cached_property
    def converted(self) -> dict[str, AnyStoryModel]:
        """What a user gets without training: the base converted with the CLIP branch that was
        trained without a ReferenceNet, as IP-Adapter is, or else with the full model's; none
        without either."""
        branch = self.models.get("no reference", self.models.get("full"))
        if branch is None:
            return {}
        made = converted(self.stack.unet, branch)
        return {f"{CONVERTED}{kind}": model for kind, model in made.items()}

    @cached_property
    def _eyes(self) -> str:
        judge = self.judge
        return weights_fingerprint(judge.finder, judge.identity, judge.segmenter)

    def model(self, name: str) -> AnyStoryModel | None:
        """A trained or converted model, if it is there."""
        known = self.converted if name.startswith(CONVERTED) else self.models
        return known.get(name)

    def has(self, name: str) -> bool:
        """Whether a row can be measured that draws with ``name``."""
        return name in WITHOUT_MODEL or self.model(name) is not None

    def key(self, name: str) -> str:
        """What the answers of a row that draws with ``name`` are valid for."""
        model, parts = self.model(name), [str(PICTURE_SIZE), self._eyes]
        if name != "real":
            parts.append(self.stack.fingerprint)
        if model is not None:
            parts.append(model.fingerprint)
        return "-".join(parts)


class Row(Protocol):
    """A row of the table. It answers some tasks at a time, each for itself; the figures are of all
    of them."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        ...

    @property
    def model(self) -> str:
        """Of :meth:`Bench.model`, or one of :data:`WITHOUT_MODEL`."""
        ...

    @property
    def counts(self) -> tuple[int, ...]:
        """How many subjects its tasks have; of several, each has an equal part of the row's
        tasks."""
        ...

    def judge(self, bench: Bench) -> Judge:
        """Whose subjects the tasks show."""
        ...

    def answers(self, bench: Bench, tasks: Sequence[Task]) -> list[Answer]:
        """Of tasks with equally many subjects, each."""
        ...

    def figures(self, answers: Sequence[Answer]) -> Result:
        """Of the answers of all tasks, one at least."""
        ...
