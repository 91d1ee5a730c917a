"""Masks for each picture of a batch, and a detector's batch of masks for several subjects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from others import row_by_row
from scene import Scene, halves, module
from torch import Tensor

MODES = ["masks", "learned within masks", "text within masks"]


def turned() -> list[Tensor]:
    """Masks of two subjects for three pictures: left and right, right and left, top and bottom."""
    left, right = halves()
    top, bottom = left.transpose(1, 2), right.transpose(1, 2)
    return [torch.cat((left, right, top)), torch.cat((right, left, bottom))]


def route(scene: Scene, mode: str, masks: list[Tensor]) -> Any:
    return scene.route(mode=mode, masks=masks, clip=scene.mini.clip)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("apart", [False, True], ids=["together", "split"])
def test_row_b_takes_mask_b(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, mode: str, apart: bool
) -> None:
    """Each picture is that of its own masks for all."""
    if apart:
        scene.split(monkeypatch)
    latent = {"latent_image": scene.latent(batch=3), "steps": 1}
    out = scene.sample(scene.apply(routing=route(scene, mode, turned())), **latent)
    for row in range(3):
        alone = [mask[row : row + 1] for mask in turned()]
        wanted = scene.sample(scene.apply(routing=route(scene, mode, alone)), **latent)
        assert torch.equal(out[row], wanted[row])


def test_one_mask_for_all_beside_one_for_each(scene: Scene) -> None:
    latent = {"latent_image": scene.latent(batch=3), "steps": 1}
    left, right = halves()
    out = scene.sample(
        scene.apply(routing=route(scene, "masks", [left.repeat(3, 1, 1), right])), **latent
    )
    wanted = scene.sample(scene.apply(routing=route(scene, "masks", [left, right])), **latent)
    assert torch.equal(out, wanted)


def test_masks_of_context_windows(scene: Scene) -> None:
    """The host's windows over a batch: each picture keeps its own mask."""
    windows = module("comfy.context_windows")
    model, maps = scene.apply_with_maps(routing=route(scene, "masks", turned()))
    handler = windows.IndexListContextHandler(
        windows.get_matching_context_schedule("standard_static"),
        windows.get_matching_fuse_method("flat"),
        context_length=2, context_overlap=0, dim=0,
    )  # fmt: skip
    windowed = model.clone()
    windowed.model_options["context_handler"] = handler
    # This host's windows need as many noise levels as pictures. Rows are batched otherwise: float32
    # rounding, amplified by two steps of a random network.
    latent = {"latent_image": scene.latent(batch=3), "steps": 2}
    wanted = scene.sample(model, **latent)
    scale = wanted.abs().max()
    out = scene.sample(windowed, **latent)
    torch.testing.assert_close(out / scale, wanted / scale, rtol=1e-2, atol=1e-3)


def test_masks_on_areas(scene: Scene) -> None:
    """Both: a prompt's part of the picture, and each picture's masks."""
    area = scene.comfy.ConditioningSetArea().append(scene.positive, 64, 128, 0, 0, 1.0)[0]
    latent = {"latent_image": scene.latent(batch=3), "steps": 1, "positive": area}
    out = scene.sample(scene.apply(routing=route(scene, "masks", turned())), **latent)
    for row in range(3):
        alone = [mask[row : row + 1] for mask in turned()]
        wanted = scene.sample(scene.apply(routing=route(scene, "masks", alone)), **latent)
        assert torch.equal(out[row], wanted[row])


def test_rows_that_nobody_names_are_refused(scene: Scene) -> None:
    """Another pack draws picture by picture: which one has which masks is not known."""
    model = row_by_row(scene, scene.apply(routing=route(scene, "masks", turned())))
    error = scene.errors.RoutingError
    with pytest.raises(error, match="^ApplyAnyStory: masks: .* 1 of 3 pictures at once"):
        scene.sample(model, latent_image=scene.latent(batch=3), steps=1)


def test_segmentation_takes_the_masks_of_each_picture(scene: Scene) -> None:
    pictures = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    given = {"model": scene.mini.model, "vae": scene.mini.vae, "noises": 1}

    def found(image: Tensor, masks: list[Tensor]) -> Tensor:
        routing = route(scene, "learned within masks", masks)
        return scene.pack.AnyStorySegment.execute(image=image, routing=routing, **given).args[0]

    out = found(pictures, turned())
    for row in range(3):
        alone = [mask[row : row + 1] for mask in turned()]
        assert torch.equal(out[2 * row : 2 * row + 2], found(pictures[row : row + 1], alone))
    with pytest.raises(scene.errors.RoutingError, match="3 masks, the batch has 2 pictures"):
        found(pictures[:2], turned())


def split(scene: Scene, masks: Tensor, order: str = "as given") -> list[Any]:
    return list(scene.pack.AnyStorySplitMasks.execute(masks=masks, order=order).args)


def test_a_detectors_masks_for_several_subjects(scene: Scene) -> None:
    small = torch.zeros(1, 64, 64)
    small[:, 20:30, 30:35] = 1
    left, right = halves()
    given = torch.cat((right, small, left))
    as_given, sideways, by_size = (
        split(scene, given, order) for order in ("as given", "left to right", "largest first")
    )
    for out, order in ((as_given, (0, 1, 2)), (sideways, (2, 1, 0)), (by_size, (0, 2, 1))):
        for mask, number in zip(out, order, strict=False):
            assert torch.equal(mask, given[number : number + 1])
    routing = scene.route(*scene.subjects, mode="masks", masks=as_given[:3])
    direct = scene.route(*scene.subjects, mode="masks", masks=[right, small, left])
    assert all(torch.equal(a, b) for a, b in zip(routing.masks, direct.masks, strict=True))
    assert [type(x).__name__ for x in as_given[3:]] == ["ExecutionBlocker"] * 5
    assert as_given[3].message.startswith("AnyStorySplitMasks: mask_4 is connected, but masks has")


def test_what_splitting_takes(scene: Scene) -> None:
    assert torch.equal(split(scene, halves()[0][0])[0], halves()[0])  # (H,W)
    ten = split(scene, torch.ones(10, 8, 8))
    assert len(ten) == 8 and all(mask.shape == (1, 8, 8) for mask in ten)
    with pytest.raises(scene.errors.RoutingError, match="AnyStorySplitMasks: order: got 'up'"):
        split(scene, torch.ones(2, 8, 8), "up")
