"""Windows of FLUX fall on the steps of the authors' code, at every number of steps."""

from __future__ import annotations

import math

import pytest
import torch

from anystory_core.bases.flux.windows import full_steps, sigma_window
from anystory_core.errors import RoutingError
from anystory_core.injection.prepare import Timing

SHIFT = 0.63


def to_sigma(fraction: float) -> float:
    """The host's ``ModelSamplingFlux.percent_to_sigma``."""
    if fraction <= 0:
        return 1.0
    if fraction >= 1:
        return 0.0
    return math.exp(SHIFT) / (math.exp(SHIFT) + 1 / (1 - fraction) - 1)


def schedule(steps: int) -> list[float]:
    """The host's scheduler "simple" over its table of 10,000 levels in float32."""
    table = torch.tensor([to_sigma(1 - i / 10_000) for i in range(1, 10_001)])
    levels = [float(table[-(1 + int(i * 10_000 / steps))]) for i in range(steps)]
    return [*levels, 0.0]


@pytest.mark.parametrize("steps", [1, 4, 6, 8, 20, 25, 28, 30, 50])
@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 1), (0.09, 1), (0.1, 0.3), (0.5, 1), (0, 0.4), (0.125, 0.5), (0.3, 0.3), (0, 0), (1, 1)],
)
def test_steps_of_the_release(steps: int, start: float, end: float) -> None:
    window = sigma_window(start, end, steps, to_sigma)
    active = [i for i, sigma in enumerate(schedule(steps)[:-1]) if window.holds(sigma)]
    first, last = int(steps * start + 0.5), int(steps * end + 0.5)
    assert active == list(range(first, last))
    assert window.empty == (start >= end) or not active


def test_a_window_to_the_end_holds_what_samplers_ask_between_steps() -> None:
    window = sigma_window(0.0, 1.0, 25, to_sigma)
    assert all(window.holds(sigma) for sigma in (1.0, 0.99, 0.5, 1e-4, 0.0))


@pytest.mark.parametrize(("denoise", "steps"), [(1.0, 25), (0.5, 10), (0.2, 5), (0.75, 21)])
def test_a_late_run_counts_the_steps_of_the_whole(denoise: float, steps: int) -> None:
    whole = int(steps / denoise)
    levels = schedule(whole)[-(steps + 1) :]
    assert full_steps(steps, levels[0], to_sigma) == whole


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_times_that_are_no_fractions_are_refused(value: float) -> None:
    for timing in (
        {"concept": (value, 1.0)}, {"concept": (0.0, value)}, {"reference_start": value},
    ):  # fmt: skip
        with pytest.raises(RoutingError, match=f"timing: got {value}, expected a fraction"):
            Timing(**timing)
    with pytest.raises(RoutingError) as caught:
        Timing(concept=(0.5, 0.25))
    assert str(caught.value).startswith(
        "concept_start: got 0.5, after concept_end = 0.25; expected"
    )
    edges = Timing(concept=(0.0, 1.0), reference_start=1.0)
    assert edges.concept == (0.0, 1.0) and Timing(concept=(0.5, 0.5)).reference_start is None
