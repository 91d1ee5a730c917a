"""Pictures that another pack draws in tiles: whose rows are whose, and what is recorded."""

from __future__ import annotations

import pytest
import torch
from others import Patch, batched_tiles, tiles
from scene import Scene, halves

# Other batch sizes: float32 rounding, amplified by one step of a random network.
CLOSE = {"rtol": 1e-2, "atol": 1e-3}


@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_in_one_call_equal_tiles_in_calls_of_their_own(scene: Scene, batch: int) -> None:
    model = scene.apply(routing=scene.route(mode="learned within masks", masks=halves()))
    given = {"latent_image": scene.latent(batch=batch), "steps": 1}
    alone = scene.sample(tiles(scene, model), **given)
    together = scene.sample(batched_tiles(scene, model), **given)
    scale = alone.abs().max()
    torch.testing.assert_close(together / scale, alone / scale, **CLOSE)


def test_words_find_their_place_in_each_tile_alone(scene: Scene) -> None:
    """What one tile's maps have shown does not go into the next one's, nor into the next step's."""
    model = scene.apply(routing=scene.route(mode="text", clip=scene.mini.clip))
    alone = scene.sample(tiles(scene, model), steps=2)
    together = scene.sample(batched_tiles(scene, model), steps=2)
    scale = alone.abs().max()
    torch.testing.assert_close(together / scale, alone / scale, **CLOSE)


@pytest.mark.parametrize("wrapper", [tiles, batched_tiles])
def test_a_tile_is_not_shown_as_the_picture(scene: Scene, wrapper: Patch) -> None:
    model, maps = scene.apply_with_maps()
    out = scene.sample(wrapper(scene, model))
    record = maps.find(out).record
    assert record.tiled and not record.levels
    shown = scene.preview(maps, out)
    assert not shown.args[1].any() and "in tiles" in shown.ui["text"][0]
    whole = maps.find(scene.sample(model)).record
    assert not whole.tiled and len(whole.levels) == 2


def test_segmentation_refuses_a_model_that_draws_in_tiles(scene: Scene) -> None:
    with pytest.raises(scene.errors.RoutingError, match="AnyStorySegment: model: another node"):
        scene.pack.AnyStorySegment.execute(
            model=tiles(scene, scene.mini.model),
            vae=scene.mini.vae,
            image=torch.rand(1, 128, 128, 3),
            routing=scene.route(),
            positive=scene.positive,
        )
