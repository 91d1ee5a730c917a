"""Packs that evaluate the model, or run the U-Net, more often than the sampler does."""

from __future__ import annotations

import logging

import pytest
import torch
from others import copied_options, more_keys, second_pass
from scene import Scene, halves

MODES = pytest.mark.parametrize("mode", ["learned", "masks", "text"])
SAID = "place that node behind Apply AnyStory"


@pytest.mark.parametrize("mode", ["learned", "masks"])
def test_options_that_were_copied_behind_apply(
    scene: Scene, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """The copy leads to the run that goes on: its conditional is that of the subjects."""
    model = scene.apply(routing=scene.route(mode=mode, masks=halves()))
    with caplog.at_level(logging.WARNING):
        out = scene.sample(copied_options(scene, model), steps=1)
    assert not [r for r in caplog.records if SAID in r.getMessage()]
    # Its conditional alone is the picture of cfg 1; rows of one call and of two are rounded apart.
    wanted = scene.sample(model, steps=1, cfg=1.0)
    scale = wanted.abs().max()
    torch.testing.assert_close(out / scale, wanted / scale, rtol=1e-2, atol=1e-3)


def test_options_that_were_copied_before_apply(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of a later node can be in them; that is said once a run, with the remedy."""
    copied = copied_options(scene, scene.mini.model)
    model = scene.apply(copied)
    with caplog.at_level(logging.WARNING):
        out = scene.sample(model, steps=3)
    assert torch.equal(out, scene.sample(copied, steps=3))
    assert len([r for r in caplog.records if SAID in r.getMessage()]) == 1
    caplog.clear()
    scene.sample(scene.apply(), steps=1)
    assert not [r for r in caplog.records if SAID in r.getMessage()]


@MODES
def test_another_pass_before_each_is_not_the_pictures(scene: Scene, mode: str) -> None:
    """Neither agreement, nor what words remember, nor the record take anything of it."""
    routing = scene.route(mode=mode, masks=halves(), clip=scene.mini.clip)
    model, maps = scene.apply_with_maps(routing=routing)
    alone = scene.sample(model, steps=3)
    record = maps.find(alone).record
    model, maps = scene.apply_with_maps(routing=routing)
    both = scene.sample(second_pass(scene, model), steps=3)
    assert torch.equal(both, alone)
    again = maps.find(both).record
    assert len(again.levels) == len(record.levels) == 3
    for level, other in zip(record.levels, again.levels, strict=True):
        assert list(level.ids) == list(other.ids)
        assert all(torch.equal(level.ids[block], other.ids[block]) for block in level.ids)


def test_references_beside_more_keys(scene: Scene, way: str) -> None:
    """Self-attention over more than a block's own tokens keeps its references (Eq. 6-8)."""
    routing = scene.route(mode="masks", masks=halves())
    with_them = scene.sample(more_keys(scene, scene.apply(routing=routing)), steps=1)
    without = more_keys(scene, scene.apply(routing=routing, reference_strength=0.0))
    assert not torch.allclose(with_them, scene.sample(without, steps=1), rtol=0.05, atol=0.05)
