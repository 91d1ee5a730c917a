"""What RoutingMapPreview sends to the viewer in the editor: the atlas file and its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from routes import random_record
from scene import Scene, module

from anystory_core.bases.sdxl.config import AnyStoryConfig

LIMIT = 2 * 2**20  # bytes of one viewer's data, file and layout together
LEVELS = 255


def path_of(file: dict[str, str]) -> Path:
    """Where /view finds a file that a node's `ui` names."""
    assert file["type"] == "temp"
    folder = Path(module("folder_paths").get_temp_directory())
    return folder / file["subfolder"] / file["filename"]


def read(entry: dict[str, Any]) -> list[dict[int, torch.Tensor]]:
    """Region ids by step and block, from grey levels as a browser reads them."""
    layout = json.loads(json.dumps(entry["layout"]))
    with Image.open(path_of(entry["file"])) as picture:
        grey = np.array(picture.convert("RGB"))[..., 0].astype(np.float64)
    ids = torch.from_numpy(np.round(grey / layout["level"]).astype(np.uint8)).flatten()
    place, steps = 0, []
    for step in layout["steps"]:
        blocks = {}
        for index, height, width in layout["grids"][step["grid"]]:
            blocks[index] = ids[place : place + height * width].reshape(height, width)
            place += height * width
        steps.append(blocks)
    return steps


def test_the_atlas_holds_the_recorded_routes(scene: Scene) -> None:
    routing = scene.route(*scene.subjects)
    model, maps = scene.apply_with_maps(routing=routing)
    out = scene.sample(model, steps=3, latent_image=scene.latent(192, 128, batch=2))
    record = maps.find(out).record
    for row in (0, 1):
        (entry,) = scene.preview(maps, out, batch_index=row).ui["anystory_routes"]
        assert entry["layout"]["labels"] == ["ball", "box", "kite", "background"]
        assert "picture" not in entry
        steps = read(entry)
        assert len(steps) == 3
        for number, blocks in enumerate(steps):
            assert tuple(blocks) == record.blocks
            for index, ids in blocks.items():
                assert torch.equal(ids, record.levels[number].map(index, row))


def test_the_picture_comes_without_the_overlay(scene: Scene) -> None:
    model, maps = scene.apply_with_maps()
    out = scene.sample(model)
    image = torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(11))
    shown = scene.preview(maps, out, image=image).ui
    (entry,) = shown["anystory_routes"]
    with Image.open(path_of(entry["picture"])) as file:
        pixels = torch.from_numpy(np.array(file)).float() / LEVELS
    assert (pixels - image[0]).abs().max() <= 1 / LEVELS  # the host rounds down to 8 bits
    assert entry["picture"] not in shown["images"]


def test_outputs_of_a_list_have_the_same_keys(scene: Scene) -> None:
    """The host joins the outputs of a node that runs over a list by the keys of the first run."""
    nowhere = [torch.ones(1, 8, 8), torch.zeros(1, 8, 8)]
    keys = set()
    for routing in (scene.route(), scene.route(mode="masks", masks=nowhere)):
        model, maps = scene.apply_with_maps(routing=routing)
        shown = scene.preview(maps, scene.sample(model, steps=1)).ui
        keys.add(tuple(shown))
        assert all(isinstance(values, (list, tuple)) for values in shown.values())
    assert len(keys) == 1


@pytest.mark.parametrize("size", [(1024, 1024), (832, 1216)])
def test_sdxl_stays_below_two_megabytes(scene: Scene, size: tuple[int, int]) -> None:
    """25 steps, 70 blocks, 3 subjects; routes by chance are the worst case there is."""
    record = random_record(
        AnyStoryConfig.sdxl(), ("fox", "owl", "bear"), steps=25, size=size, seed=4
    )
    latent = torch.zeros(1, 4, size[0] // 8, size[1] // 8)
    maps = module("anystory_pack.nodes.host.sockets").RoutingMaps()
    maps.file([latent], record)
    (entry,) = scene.preview(maps, latent, steps="last").ui["anystory_routes"]
    layout = entry["layout"]
    assert len(layout["steps"]) == layout["count"] == 25 and len(layout["blocks"]) == 70
    assert path_of(entry["file"]).stat().st_size + len(json.dumps(layout)) <= LIMIT
    last = read(entry)[-1]
    assert all(torch.equal(ids, record.levels[24].map(index, 0)) for index, ids in last.items())
