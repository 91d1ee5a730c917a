"""The atlas of the viewer: exact, small, and thinned honestly when it must be."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from routes import halves, random_record, record_of

from anystory_core.bases.flux.config import FluxConfig
from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.errors import RoutingError
from anystory_core.pictures.atlas import LIMIT, Atlas, build_atlas

THREE = ("fox", "owl", "bear")


def unpack(atlas: Atlas) -> list[dict[int, torch.Tensor]]:
    """Reads an atlas as the browser does: grey levels, line by line."""
    layout = json.loads(json.dumps(atlas.layout))  # the layout survives JSON
    grey = np.array(Image.open(io.BytesIO(atlas.png)).convert("RGB"))[..., 0].astype(np.float64)
    ids = torch.from_numpy(np.round(grey / layout["level"]).astype(np.uint8)).flatten()
    place, steps = 0, []
    for step in layout["steps"]:
        blocks = {}
        for index, height, width in layout["grids"][step["grid"]]:
            blocks[index] = ids[place : place + height * width].reshape(height, width)
            place += height * width
        steps.append(blocks)
    return steps


@pytest.mark.parametrize("size", [(256, 256), (208, 304)])
def test_every_region_id_comes_back(size: tuple[int, int]) -> None:
    record = random_record(AnyStoryConfig.mini(), tuple("abcdefgh"), steps=3, size=size, seed=7)
    steps = unpack(build_atlas(record, 0))
    assert len(steps) == 3
    for number, blocks in enumerate(steps):
        assert sorted(blocks) == list(record.blocks)
        for index, ids in blocks.items():
            expected = record.levels[number].map(index, 0)
            assert expected is not None and torch.equal(ids, expected)


def test_sdxl_at_full_length_stays_below_two_megabytes() -> None:
    """25 steps, 70 blocks, 3 subjects, 1024 squared; chance is the worst case there is."""
    record = random_record(AnyStoryConfig.sdxl(), THREE, steps=25, size=(1024, 1024), seed=3)
    atlas = build_atlas(record, 0)
    assert len(atlas.layout["steps"]) == 25 and len(atlas.layout["blocks"]) == 70
    assert len(atlas.png) + len(json.dumps(atlas.layout)) <= LIMIT


def test_flux_at_full_length() -> None:
    """25 steps, 57 blocks, 2 subjects, 1024 squared: all are there, none is left out."""
    record = random_record(FluxConfig(), THREE[:2], steps=25, size=(1024, 1024), seed=3)
    atlas = build_atlas(record, 0)
    labels = list(atlas.layout["blocks"].values())
    assert labels == [*(f"double {i}" for i in range(19)), *(f"single {i}" for i in range(38))]
    assert atlas.layout["grids"] == [[[index, 64, 64] for index in range(1, 58)]]
    assert len(atlas.layout["steps"]) == 25
    assert len(atlas.png) + len(json.dumps(atlas.layout)) <= LIMIT
    last = unpack(atlas)[24]
    for index in (1, 19, 20, 57):
        expected = record.levels[24].map(index, 0)
        assert expected is not None and torch.equal(last[index], expected)


def test_steps_are_left_out_evenly_above_the_limit() -> None:
    record = random_record(AnyStoryConfig.mini(), THREE, steps=12, size=(256, 256), seed=5)
    whole = build_atlas(record, 0)
    half = build_atlas(record, 0, limit=len(whole.png) * 2 // 3)
    numbers = [step["number"] for step in half.layout["steps"]]
    assert numbers == list(range(0, 12, 2)) and half.layout["count"] == 12
    assert torch.equal(unpack(half)[1][5], unpack(whole)[2][5])


def test_steps_of_different_shape_and_steps_without_routes() -> None:
    """Another pack may change the grid at some steps; outside all windows nothing is recorded."""
    record = record_of(AnyStoryConfig.mini(), halves(2), steps=2)
    record.levels += record_of(AnyStoryConfig.mini(), halves(2), steps=1, size=(128, 128)).levels
    record.levels.append(type(record.levels[0])(0.1, (False, False)))
    layout = build_atlas(record, 0).layout
    assert [step["grid"] for step in layout["steps"]] == [0, 0, 1, 2]
    assert layout["grids"][2] == []
    assert layout["steps"][3]["active"] == [False, False]


def test_layout_tells_names_and_colours() -> None:
    record = record_of(AnyStoryConfig.mini(), halves(2), steps=1)
    layout = build_atlas(record, 0).layout
    assert layout["labels"] == ["fox", "owl", "background"]
    assert len(set(layout["colors"])) == 3
    assert layout["blocks"]["1"] == record.sites[0].label


def test_what_cannot_be_shown_is_said() -> None:
    config = AnyStoryConfig.mini()
    with pytest.raises(RoutingError, match="no routes were recorded"):
        build_atlas(record_of(config, halves(2), steps=0), 0)
    with pytest.raises(RoutingError, match="got 12 subjects"):
        build_atlas(record_of(config, halves(12), labels=tuple("abcdefghijkl"), steps=1), 0)
    with pytest.raises(RoutingError, match="batch_index"):
        build_atlas(record_of(config, halves(2), steps=1), 3)
