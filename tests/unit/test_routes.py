"""Soft maps on other grids, and the user's masks."""

from __future__ import annotations

import math
from typing import Any

import naive
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anystory_core.bases.sdxl.config import UNetConfig
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.config import RouterConfig
from anystory_core.routing.grids import SoftMaps, resize_soft
from anystory_core.routing.router import Routers
from anystory_core.routing.sources import LearnedRoutes, MaskRoutes

SITES = build_sites(
    UNetConfig(
        model_channels=8, channel_mult=(1, 2), transformer_depth=(0, 1), middle_depth=1,
        head_dim=4, context_dim=6, adm_channels=8, norm_groups=4,
    )
)  # fmt: skip


def disc_and_rest(size: int) -> Tensor:
    """Two masks (2,size,size)."""
    axis = torch.linspace(-1, 1, size)
    disc = (axis[:, None] ** 2 + axis[None] ** 2 < 0.6).float()
    return torch.stack((disc, 1 - disc))


@torch.no_grad()
def learned(masks: Tensor) -> LearnedRoutes:
    """A random router of two subjects within ``masks`` (2,H,W)."""
    torch.manual_seed(0)
    routers = Routers(RouterConfig(key_dim=4, heads=2), SITES, routing_dim=5)
    return LearnedRoutes.prepare(routers, 3 * torch.randn(1, 3, 5), masks=MaskRoutes(tuple(masks)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((4, 4), (2, 2)),
        ((5, 7), (3, 4)),
        ((3, 4), (5, 7)),
        ((4, 6), (5, 5)),
        ((8, 2), (3, 5)),
        ((1, 1), (2, 3)),
        ((2, 3), (1, 1)),
    ],
)
def test_resize_rule(old: tuple[int, int], new: tuple[int, int]) -> None:
    maps = torch.rand(2, 3, math.prod(old), generator=torch.Generator().manual_seed(0)).double()
    got = resize_soft(SoftMaps(maps, old), new)
    assert got.grid == new
    for row in range(2):
        assert torch.allclose(got.maps[row], naive.resize(maps[row], old, new), atol=1e-12)
    assert resize_soft(SoftMaps(maps, old), old).maps is maps


@pytest.mark.parametrize(("old", "new"), [((4, 4), (8, 8)), ((8, 8), (4, 4)), ((3, 4), (5, 7))])
def test_within_masks_holds_on_every_grid(old: tuple[int, int], new: tuple[int, int]) -> None:
    """Resizing to the next block's grid blurs a map over the masks' borders, but not its route."""
    masks = disc_and_rest(64)
    source = learned(masks)
    site = SITES[0]
    z = 3 * torch.randn(2, math.prod(old), site.channels)
    carried = source.resize(source.maps(site, z, old, ()), new, ())
    inside = torch.nn.functional.adaptive_avg_pool2d(masks, new).flatten(1) >= 0.5
    ids = carried.maps.argmax(dim=1)
    for i in range(2):
        assert not bool(((ids == i) & ~inside[i]).any())
    assert {0, 1} <= set(ids.flatten().tolist())


def test_a_token_that_keeps_nothing_is_the_background() -> None:
    """A router that is sure of subject 1 leaves exactly nothing to the others."""
    source = MaskRoutes((torch.zeros(4, 4), torch.ones(4, 4)))
    sure = torch.zeros(1, 3, 16)
    sure[:, 0] = 1
    assert bool((source.confine(SoftMaps(sure, (4, 4)), ()).maps.argmax(dim=1) == 2).all())


def test_masks_are_copied_to_a_device_once() -> None:
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.count += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    source = learned(disc_and_rest(16))
    masks = MaskRoutes(tuple(disc_and_rest(16)))
    soft = SoftMaps(torch.zeros(1, 3, 16, device="meta"), (4, 4))
    masks.resize(soft, (2, 2), ())
    source.resize(soft, (2, 2), ())
    with Copies() as copies:
        masks.resize(soft, (2, 2), ())
        source.resize(soft, (2, 2), ())
    assert copies.count == 0


def test_resizing_enters_no_autocast_where_none_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """DirectML's device has no autocast, and refuses to switch it off."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the backend has not registered a module")

    maps = torch.rand(1, 3, 16)
    wanted = resize_soft(SoftMaps(maps, (4, 4)), (2, 3)).maps
    monkeypatch.setattr(torch, "autocast", refuse)
    assert torch.equal(resize_soft(SoftMaps(maps, (4, 4)), (2, 3)).maps, wanted)


def test_resizing_keeps_its_precision_under_autocast() -> None:
    maps = torch.rand(1, 3, 16)
    wanted = resize_soft(SoftMaps(maps, (4, 4)), (2, 3)).maps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize_soft(SoftMaps(maps, (4, 4)), (2, 3)).maps, wanted)
