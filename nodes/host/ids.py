"""Names that the host sees: socket types, option keys, folders; and one compatibility helper."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any

from comfy_api.latest import io

from ...anystory_core.errors import AnyStoryError

CATEGORY = "AnyStory"
FOLDER = "anystory"  # models/anystory
SUBJECTS = "subjects"  # models/anystory/subjects

AnyStory = io.Custom("ANYSTORY")
Subject = io.Custom("ANYSTORY_SUBJECT")
Routing = io.Custom("ANYSTORY_ROUTING")
Maps = io.Custom("ANYSTORY_MAPS")

WRAPPER_KEY = "anystory"  # our wrappers and additional models on a ModelPatcher
RUN_KEY = "anystory_run"  # transformer_options: they are of the run that goes on
EVALUATION_KEY = "anystory_evaluation"  # transformer_options: what its lists of conds are
ALONE_KEY = "anystory_alone"  # transformer_options: slots that another pack filled while sampling
CALL_KEY = "anystory_call"  # transformer_options: the Call of this forward pass
OVERRIDE = "optimized_attention_override"  # transformer_options: the host's for other attention
STATES_KEY = "anystory_states"  # options of one block: its norm2 output, while Eq. 5 is to come

MAX_SUBJECTS = 8


def schema(**kwargs: Any) -> io.Schema:
    """``io.Schema`` without the arguments that this host does not know yet."""
    known = inspect.signature(io.Schema).parameters
    return io.Schema(**{name: value for name, value in kwargs.items() if name in known})


def linked(*names: object) -> bool:
    """Whether another node gives one of these names: the host asks for a fingerprint with None for
    it, and knows that node's state by itself."""
    return not all(isinstance(name, str) for name in names)


def named_errors(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for ``execute``: an :class:`AnyStoryError` gets the node's name in front."""
    # Not the class's own name: the host runs a copy of the class under another one.
    node = execute.__qualname__.split(".")[0]

    @functools.wraps(execute)
    def wrapped(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> Any:
        with named(node):
            return execute(cls, *args, **kwargs)

    return wrapped


@contextlib.contextmanager
def named(node: str) -> Generator[None, None, None]:
    """An :class:`AnyStoryError` inside gets the node's name in front."""
    try:
        yield
    except AnyStoryError as error:
        raise type(error)(f"{node}: {error}") from error
