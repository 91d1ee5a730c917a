"""Packs that run cross-attention with more rows than the block has, one per prompt of theirs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from others import attention_couple, hook_couple, late_couple, nag
from scene import Scene, halves, module
from torch import Tensor

# Other batch sizes: float32 rounding, amplified by one step of a random network.
CLOSE = {"rtol": 1e-2, "atol": 1e-3}
MODES = pytest.mark.parametrize("mode", ["learned", "masks", "text"])


def from_the_model(scene: Scene, model: Any, given: dict[str, Any]) -> Tensor:
    return scene.sample(attention_couple(scene, model, words=None), **given)


def from_a_hook(scene: Scene, model: Any, given: dict[str, Any]) -> Tensor:
    return scene.sample(model, positive=hook_couple(scene, scene.positive), **given)


def from_a_wrapper(scene: Scene, model: Any, given: dict[str, Any]) -> Tensor:
    return scene.sample(late_couple(scene, model), **given)


@pytest.mark.parametrize("batch", [1, 2])
@MODES
@pytest.mark.parametrize("way", [from_the_model, from_a_hook, from_a_wrapper])
def test_a_couple_of_one_prompt_changes_nothing(
    scene: Scene, caplog: pytest.LogCaptureFixture, way: Any, mode: str, batch: int
) -> None:
    """Its masks add up to 1, so subjects must be there in full, in every row, wherever its patches
    come from."""
    routing = scene.route(mode=mode, masks=halves(), clip=scene.mini.clip)
    model, maps = scene.apply_with_maps(routing=routing)
    given = {"latent_image": scene.latent(batch=batch), "steps": 1}
    alone = scene.sample(model, **given)
    with caplog.at_level(logging.WARNING):
        both = way(scene, model, given)
    assert not [r for r in caplog.records if "goes without" in r.getMessage()]
    scale = alone.abs().max()
    torch.testing.assert_close(both / scale, alone / scale, **CLOSE)
    assert maps.find(both).record.blocks == maps.find(alone).record.blocks


@MODES
def test_more_rows_of_text_than_of_the_latent(scene: Scene, mode: str) -> None:
    """Where the others change nothing, the picture is that of the subjects alone."""
    routing = scene.route(mode=mode, masks=halves(), clip=scene.mini.clip)
    model = scene.apply(routing=routing)
    alone = scene.sample(model, steps=1)
    scale = alone.abs().max()
    both = scene.sample(nag(scene, model, scale=1.0), steps=1)
    torch.testing.assert_close(both / scale, alone / scale, **CLOSE)


def test_what_cannot_be_done_is_said(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Rows that are multiplied before our first patch are nobody's that we know: once a block."""
    patcher = module("anystory_pack.nodes.host.sdxl.patcher")
    sites = scene.mini.anystory.model.sites
    patch = patcher.CrossAttentionPatch(patcher.BlockTable(sites), lambda q, k, v, options: q)
    q = torch.zeros(3, 64, sites[0].channels)
    for site in (sites[0], sites[1], sites[0]):
        options = {
            "block": (site.part, site.number),
            "block_index": site.block_index,
            "activations_shape": [2, 8, 8, 8],
            scene.ids.CALL_KEY: object(),
        }
        with caplog.at_level(logging.WARNING):
            assert patch(q, q, q, options) is q
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and all("has 3 rows of 64 tokens for 2 of" in text for text in said)
    assert all(text.endswith("it goes without the subjects.") for text in said)
