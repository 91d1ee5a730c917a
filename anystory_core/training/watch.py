"""One process's end is the end of all, whatever started them.

A process that waits for another in a collective operation learns nothing of its death for half an
hour. Launchers that notice it end the others of their own machine at best. So each process has a
thread that tells a store it is alive, and that ends the process when another has failed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any, Protocol, cast

from torch import distributed

from ..errors import AnyStoryError
from .libraries import library
from .ranks import Ranks, on_cpu
from .stopping import Stopped

_BEAT = 1.0  # seconds between two signs of life
_SILENCE = 120.0  # after which a process counts as dead
_FAILED = "failed"


class Store(Protocol):
    """What this module uses of torch.distributed's stores."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def _end(reason: str) -> None:
    """End this process at once: its main thread may be in a collective operation for ever."""
    print(f"error: {reason}; this process ends, too", file=sys.stderr, flush=True)
    os._exit(1)


class Watch:
    """Tells the others that this process is alive, and learns of their failures."""

    def __init__(
        self,
        store: Store,
        index: int,
        count: int,
        *,
        end: Callable[[str], None] = _end,
        beat: float = _BEAT,
        silence: float = _SILENCE,
    ) -> None:
        self._store, self._index, self._count = store, index, count
        self._end, self._beat, self._silence = end, beat, silence
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        heard = [time.monotonic()] * self._count
        last = [""] * self._count
        number = 0
        while not self._over.wait(self._beat):
            number += 1
            try:
                self._store.set(f"alive/{self._index}", str(number))
                reason = self._failure()
                if reason is None and self._index == 0:
                    reason = self._silent(heard, last)
            except RuntimeError:
                reason = "the main process has ended"
            if reason is not None and not self._over.is_set():
                self._end(reason)
                return

    def _failure(self) -> str | None:
        if not self._store.check([_FAILED]):
            return None
        return self._store.get(_FAILED).decode()

    def _silent(self, heard: list[float], last: list[str]) -> str | None:
        """The process that has shown no life for too long, as a reason to end; looked for by the
        main process, for all."""
        for index in range(1, self._count):
            key = f"alive/{index}"
            now = self._store.get(key).decode() if self._store.check([key]) else ""
            if now != last[index]:
                last[index], heard[index] = now, time.monotonic()
            elif now != "over" and time.monotonic() - heard[index] > self._silence:
                reason = f"process {index} has shown no life for {self._silence:.0f} seconds"
                self._store.set(_FAILED, reason)
                return reason
        return None

    def close(self, failure: str | None = None) -> str | None:
        """Stop watching; tell the others why this process failed, if it did. Returns another's
        failure that was there before, which may be what this one died of."""
        self._over.set()
        self._thread.join()
        earlier = None
        with contextlib.suppress(RuntimeError):  # the store may be gone
            if failure is None:
                self._store.set(f"alive/{self._index}", "over")
            else:
                earlier = self._failure()
                if earlier is None:
                    self._store.set(_FAILED, f"process {self._index} has failed: {failure}")
            if self._index == 0:
                self._linger(failed=failure is not None)
        return earlier

    def _linger(self, *, failed: bool) -> None:
        """The store ends with the main process: let the others read it first."""
        until = time.monotonic() + (3 * self._beat if failed else self._silence)
        others = [f"alive/{index}" for index in range(1, self._count)]
        while time.monotonic() < until and not self._failure_seen(failed):
            over = [self._store.check([k]) and self._store.get(k) == b"over" for k in others]
            if not failed and all(over):
                return
            time.sleep(min(0.05, self._beat))

    def _failure_seen(self, failed: bool) -> bool:
        return not failed and self._failure() is not None


@contextlib.contextmanager
def together() -> Generator[None, None, None]:
    """Around all of a run's work: the process group is made, and a failure inside ends all of its
    processes. Without a launcher that starts several, it does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    state = library("accelerate").PartialState(cpu=on_cpu())
    ranks = Ranks(state.device)
    host = os.environ.get("MASTER_ADDR") or "localhost"
    wait = timedelta(seconds=60)
    make = cast(Any, distributed).TCPStore
    store: Any = make(host, 0, None, True, wait, wait_for_workers=False) if ranks.main else None
    port: int = ranks.broadcast(store.port if ranks.main else 0)
    store = store or make(host, port, None, False, wait)
    watch = Watch(store, ranks.index, ranks.count)
    try:
        yield
    except Stopped:  # in all processes alike
        watch.close()
        raise
    except BaseException as error:
        earlier = watch.close(" ".join(str(error).split()) or type(error).__name__)
        if earlier is None:
            raise
        # A collective operation breaks off when a partner has gone, mostly sooner than the watch.
        raise AnyStoryError(f"{earlier}; this process ends, too") from error
    watch.close()
