"""The host's progress bar: it only goes forward, and ends full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from scene import Scene, module


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Every share, 0 to 1, that the host is told while a node runs."""
    utils = module("comfy.utils")
    # Newer hosts leave out what follows too fast.
    monkeypatch.setattr(utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)
    before, shares = utils.PROGRESS_BAR_HOOK, []
    utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: shares.append(value / total)
    )
    yield shares
    utils.set_progress_bar_global_hook(before)


def segment(scene: Scene, pictures: int) -> Any:
    return scene.pack.AnyStorySegment.execute(
        model=scene.mini.model,
        vae=scene.mini.vae,
        image=torch.rand(pictures, 64, 64, 3),
        routing=scene.route(),
        noises=6,  # two passes
    )


@pytest.mark.parametrize(
    ("run", "least"),
    [
        (lambda scene: scene.encode(0), 3),
        (lambda scene: scene.sample(scene.apply(), steps=1), 3),
        (lambda scene: scene.sample(scene.apply(), steps=3), 5),
        (lambda scene: segment(scene, 1), 3),
        (lambda scene: segment(scene, 2), 6),
    ],
    ids=["encode", "one step", "three steps", "one picture", "two pictures"],
)
def test_forward_and_full(
    scene: Scene, seen: list[float], run: Callable[[Scene], Any], least: int
) -> None:
    seen.clear()
    run(scene)
    assert len(seen) >= least and seen[-1] == 1
    assert all(a < b for a, b in zip(seen, seen[1:], strict=False)), seen
