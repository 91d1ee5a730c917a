"""Packs that run cross-attention with more rows than the block has, one per prompt of theirs."""

from __future__ import annotations

import logging

import pytest
import torch
from others import attention_couple, late_couple
from scene import Scene, halves

# Other batch sizes: float32 rounding, amplified by one step of a random network.
CLOSE = {"rtol": 1e-2, "atol": 1e-3}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mode", ["learned", "masks", "text"])
def test_a_couple_of_one_prompt_changes_nothing(
    scene: Scene, caplog: pytest.LogCaptureFixture, mode: str, batch: int
) -> None:
    """Its masks add up to 1, so subjects must be there in full, in every row."""
    routing = scene.route(mode=mode, masks=halves(), clip=scene.mini.clip)
    model, maps = scene.apply_with_maps(routing=routing)
    given = {"latent_image": scene.latent(batch=batch), "steps": 1}
    alone = scene.sample(model, **given)
    with caplog.at_level(logging.WARNING):
        both = scene.sample(attention_couple(scene, model, words=None), **given)
    assert not [r for r in caplog.records if "goes without" in r.getMessage()]
    scale = alone.abs().max()
    torch.testing.assert_close(both / scale, alone / scale, **CLOSE)
    assert maps.find(both).record.blocks == maps.find(alone).record.blocks


def test_what_cannot_be_done_is_said(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Rows that are multiplied before our first patch are nobody's that we know."""
    with caplog.at_level(logging.WARNING):
        out = scene.sample(late_couple(scene, scene.apply()), steps=2)
    assert torch.isfinite(out).all()
    said = [
        r.getMessage() for r in caplog.records if "goes without the subjects." in r.getMessage()
    ]
    assert "has 3 rows of" in said[0]
    assert len(said) == len(set(said)) == len(scene.mini.anystory.model.sites)
