"""Films -> shots -> a few frames of each, apart in time and upright, by PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .libraries import library

_THUMBNAIL = 32  # pixels a side, by which frames are compared
_QUARTERS = {0: 0, 90: 1, 180: 2, 270: 3}  # turns to the left


@dataclass(frozen=True)
class Cut:
    """How films are cut and frames are picked. ``cut`` and ``least_change`` are mean differences of
    two frames' thumbnails in [0,1]: from one to the next where a shot ends, and between any two
    frames that are kept."""

    views: int
    apart: float  # seconds between frames that are kept
    cut: float
    least_change: float


@dataclass(frozen=True)
class Frame:
    """A frame that was picked. ``number`` counts the film's frames from 0."""

    number: int
    seconds: float
    picture: NDArray[np.uint8]  # (H,W,3), upright
    thumbnail: NDArray[np.float32]


def shots(path: str, settings: Cut) -> Iterator[list[Frame]]:
    """The picked frames of every shot, in order, at most ``views`` each. DataError: no film, or one
    that cannot be decoded to its end."""
    av = library("av", "av")
    try:
        with av.open(path) as film:
            if not film.streams.video:
                raise DataError(f"{path} has no picture")
            stream = film.streams.video[0]
            stream.thread_type = "AUTO"
            yield from _cut(film.decode(stream), settings)
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(f"{path} is no film ({error})") from error


def _cut(frames: Iterator[Any], settings: Cut) -> Iterator[list[Frame]]:
    shot = _Shot(settings)
    before: NDArray[np.float32] | None = None
    for number, frame in enumerate(frames):
        small = frame.reformat(width=_THUMBNAIL, height=_THUMBNAIL, format="rgb24").to_ndarray()
        thumbnail = small.astype(np.float32) / 255
        if before is not None and _differ(before, thumbnail) > settings.cut:
            yield shot.picked()
            shot = _Shot(settings)
        before = thumbnail
        seconds = float(frame.time if frame.time is not None else number / 25)
        if shot.wants(seconds):
            shot.add(Frame(number, seconds, _upright(frame), thumbnail))
    yield shot.picked()


class _Shot:
    """Frames so far. When there are more than twice as many as wanted, every other one goes, so
    that memory is bounded and what is left lies apart in the whole of the shot."""

    def __init__(self, settings: Cut) -> None:
        self._settings = settings
        self._frames: list[Frame] = []
        self._apart = settings.apart

    def wants(self, seconds: float) -> bool:
        return not self._frames or seconds >= self._frames[-1].seconds + self._apart - 1e-6

    def add(self, frame: Frame) -> None:
        self._frames.append(frame)
        if len(self._frames) > 2 * self._settings.views:
            self._frames = self._frames[::2]
            self._apart *= 2

    def picked(self) -> list[Frame]:
        """Evenly over the shot, without those that look like one that is there."""
        kept: list[Frame] = []
        for frame in self._frames:
            if all(
                _differ(frame.thumbnail, other.thumbnail) >= self._settings.least_change
                for other in kept
            ):
                kept.append(frame)
        count = min(len(kept), self._settings.views)
        return [kept[round(float(i))] for i in np.linspace(0, len(kept) - 1, count)]


def _differ(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(one - other).mean())


def _upright(frame: Any) -> NDArray[np.uint8]:
    """(H,W,3), turned as the film's note for players says."""
    picture = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, _QUARTERS.get(int(frame.rotation) % 360, 0)))
