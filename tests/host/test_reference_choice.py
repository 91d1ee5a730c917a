"""Apply AnyStory's choice of references, in the host."""

from __future__ import annotations

import pytest
import torch
from scene import Scene


def test_apply_can_change_what_the_file_says(scene: Scene) -> None:
    """The mini model is trained on whole cut-outs, and its file says so."""
    routing = scene.route()
    assert scene.mini.anystory.model.config.references == "whole"

    def drawn(**settings: str) -> torch.Tensor:
        return scene.sample(scene.apply(routing=routing, **settings), steps=1)

    plain, named = drawn(), drawn(references="as in the file")
    assert torch.equal(plain, named) and torch.equal(plain, drawn(references="whole"))
    others = [drawn(references=which) for which in ("masked", "masked in the decoder")]
    assert not torch.equal(others[0], plain) and not torch.equal(others[1], plain)
    assert not torch.equal(*others)
    with pytest.raises(scene.errors.RoutingError, match="references: got 'some', expected one of"):
        scene.apply(routing=routing, references="some")
