"""What ApplyAnyStory leaves on a model: wrappers that hand every call to the run that goes on.

Some packs copy a model's options when their node runs and evaluate the model with the copy later.
A run's own patches cannot be in such a copy, but the wrappers of a :class:`Handover` are: they lie
in the model's options from Apply on, and do nothing unless a run goes on. Options that were copied
before Apply do not have them; that is said in the log.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import torch
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from torch import Tensor

from .base import Entry, Passes
from .ids import RUN_KEY, WRAPPER_KEY


class Handover:
    """Knows the run that goes on, and stands for it in the options of one applied model."""

    def __init__(self) -> None:
        self.run: Passes | None = None
        self._evaluating = 0  # depth of evaluations that went through our wrapper
        self._told = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Handover:
        return self  # a copy of the options belongs to the same run

    def attach(self, model: Any) -> None:
        """Put the wrappers into the options of a ModelPatcher."""
        for kind, wrapper in (
            (WrappersMP.PREPARE_SAMPLING, self.prepare_sampling),
            (WrappersMP.PREDICT_NOISE, self.predict_noise),
            (WrappersMP.CALC_COND_BATCH, self.calc_cond_batch),
            (WrappersMP.DIFFUSION_MODEL, self.diffusion_model),
        ):
            comfy.patcher_extension.add_wrapper_with_key(
                kind, WRAPPER_KEY, wrapper, model.model_options, is_model_options=True
            )
        model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, WRAPPER_KEY, self.prepare_state)

    @contextlib.contextmanager
    def to(self, passes: Passes, options: dict[str, Any]) -> Generator[None, None, None]:
        """Inside, calls go to ``passes``. ``options``: the guider's own model options; copies of
        them can be told from those that were made before the run."""
        outer, before = self.run, options["transformer_options"]
        self.run, self._told = passes, False
        options["transformer_options"] = {**before, RUN_KEY: passes}
        try:
            yield
        finally:
            options["transformer_options"] = before
            self.run = outer

    # The wrappers.

    def prepare_sampling(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        if self.run is None:
            return executor(*args, **kwargs)
        return _innermost(executor, self.run.prepare_sampling).execute(*args, **kwargs)

    def predict_noise(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        if self.run is None:
            return executor(*args, **kwargs)
        return _innermost(executor, self.run.predict_noise).execute(*args, **kwargs)

    def calc_cond_batch(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        if self.run is None:
            return executor(*args, **kwargs)
        self._evaluating += 1
        try:
            return _innermost(executor, self.run.calc_cond_batch).execute(*args, **kwargs)
        finally:
            self._evaluating -= 1

    # In a compiled model this stays out of the graphs, what it leads to does not.
    @torch.compiler.disable(recursive=False)
    def diffusion_model(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        if run is None:
            return executor(*args, **kwargs)

        return _innermost(executor, _Inner(run, Entry())).execute(*args, **kwargs)

    def prepare_state(self, patcher: Any, timestep: Tensor, *_: Any) -> None:
        """Callback of every evaluation, also of those whose options lack the wrappers."""
        if self.run is not None and not self._evaluating and not self._told:
            self._told = True
            logging.warning(
                "AnyStory: another node evaluates the model with options from before Apply "
                "AnyStory, and what it finds goes without the subjects; place that node behind "
                "Apply AnyStory."
            )


@dataclass(frozen=True)
class _Inner:
    """The wrapper of a run for the passes of one call into the diffusion model."""

    run: Passes
    entry: Entry

    @torch.compiler.disable(recursive=False)
    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        return self.run.diffusion_model(executor, self.entry, *args, **kwargs)


@torch.compiler.disable
def _innermost(executor: WrapperExecutor, wrapper: Callable[..., Any]) -> WrapperExecutor:
    """What is left of ``executor`` behind the wrapper that it runs, and ``wrapper`` behind that."""
    rest = [*executor.wrappers[executor.idx + 1 :], wrapper]
    return WrapperExecutor(executor.original, executor.class_obj, rest, 0)
