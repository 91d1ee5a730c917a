"""The router's switch in the host: when blocks decide together, and when it does nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from others import tiles
from scene import Scene, halves, module
from torch import Tensor


def run(scene: Scene, routing: Any, **options: Any) -> tuple[Tensor, Any]:
    """The latent, and the recorded region ids by noise level and block."""
    model, maps = scene.apply_with_maps(routing=routing)
    latent = scene.sample(model, **options)
    return latent, maps.find(latent).record


def regions(record: Any) -> Tensor:
    ids = [ids.flatten() for level in record.levels for ids in level.ids.values()]
    return torch.cat(ids)


def test_off_is_each_block_for_itself(scene: Scene) -> None:
    agreed, together = run(scene, scene.route())
    apart, alone = run(scene, scene.route(agreement=False))
    assert not torch.equal(agreed, apart)
    assert not torch.equal(regions(together), regions(alone))
    assert set(regions(together).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("mode", ["masks", "learned within masks", "text"])
def test_other_rules_have_nothing_to_agree_on(scene: Scene, mode: str) -> None:
    given = {"mode": mode, "masks": halves(), "clip": scene.mini.clip}
    on, off = (run(scene, scene.route(agreement=on, **given))[0] for on in (True, False))
    assert torch.equal(on, off)


def test_one_subject_begins_everywhere(scene: Scene) -> None:
    """While there is little but noise, 15 % of the schedule; then where the router says."""
    sampling = scene.mini.model.get_model_object("model_sampling")
    from_level = float(sampling.percent_to_sigma(0.15))
    one = scene.subjects[0]
    records = [
        run(scene, scene.route(one, agreement=on), steps=10)[1].levels for on in (True, False)
    ]
    begun = [level.sigma >= from_level for level in records[0]]
    assert begun == [True] * 2 + [False] * 8
    for levels, everywhere in zip(records, (begun, [False] * 10), strict=True):
        found = [{int(i) for ids in level.ids.values() for i in ids.unique()} for level in levels]
        assert found == [{0} if blank else {0, 1} for blank in everywhere]
        assert [level.everywhere for level in levels] == everywhere


def test_one_subject_in_a_picture_that_exists_is_routed(scene: Scene) -> None:
    routes = (scene.route(scene.subjects[0], agreement=on) for on in (True, False))
    on, off = (run(scene, routing, denoise=0.5)[0] for routing in routes)
    assert torch.equal(on, off)


def test_one_subject_in_tiles_is_routed(scene: Scene) -> None:
    """Which need not all show it."""
    routes = (scene.route(scene.subjects[0], agreement=on) for on in (True, False))
    on, off = (scene.sample(tiles(scene, scene.apply(routing=routing))) for routing in routes)
    assert torch.equal(on, off)


@pytest.mark.parametrize("part", ["area", "mask"])
def test_prompts_for_a_part_of_the_picture_decide_alone(scene: Scene, part: str) -> None:
    """They may well mean one subject only."""
    nodes = module("nodes")
    if part == "area":
        own = nodes.ConditioningSetArea().append(scene.positive, 64, 128, 0, 0, 1.0)[0]
    else:
        own = nodes.ConditioningSetMask().append(scene.positive, halves()[0], "default", 1.0)[0]
    routes = (scene.route(agreement=on) for on in (True, False))
    on, off = (run(scene, routing, positive=own)[0] for routing in routes)
    assert torch.equal(on, off)


def test_an_area_that_is_the_whole_picture_is_no_part(scene: Scene) -> None:
    whole = module("nodes").ConditioningSetArea().append(scene.positive, 128, 128, 0, 0, 1.0)[0]
    agreed, plain = (run(scene, scene.route(), positive=p)[1] for p in (whole, scene.positive))
    assert torch.equal(regions(agreed), regions(plain))


def test_segmentation_asks_the_picture_alone(scene: Scene) -> None:
    image = torch.rand(1, 128, 96, 3, generator=torch.Generator().manual_seed(0))
    given = {"model": scene.mini.model, "vae": scene.mini.vae, "image": image}
    given |= {"noises": 2, "seed": 3, "positive": scene.positive}
    on, off = (
        scene.pack.AnyStorySegment.execute(**given, routing=scene.route(agreement=on)).args[0]
        for on in (True, False)
    )
    assert torch.equal(on, off)
