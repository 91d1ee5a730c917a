"""A run that is asked to end: it saves first, and the same command goes on from there."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from ..errors import AnyStoryError


class Stopped(AnyStoryError):
    """The run was asked to end, and has saved its checkpoint."""


class Stopping:
    """Notes SIGTERM, which batch systems and spot machines send some 30 seconds or more before they
    end a process. Inside ``with``, in the main thread; elsewhere signals are not ours."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
