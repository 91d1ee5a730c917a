"""A host that spreads the conds of an evaluation over several devices, in threads."""

from __future__ import annotations

import pytest
import torch
from scene import Scene, halves, module
from threads import at_once


@pytest.mark.parametrize("mode", ["learned", "masks", "text", "learned within masks"])
def test_conds_in_threads(scene: Scene, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """The positive and the negative at the same time give what they give one after the other."""
    routing = scene.route(mode=mode, masks=halves(), clip=scene.mini.clip)
    model, maps = scene.apply_with_maps(routing=routing)
    scene.split(monkeypatch)
    wanted = scene.sample(model, steps=3)
    samplers = module("comfy.samplers")
    monkeypatch.setattr(samplers, "_calc_cond_batch", at_once(samplers._calc_cond_batch))
    assert torch.equal(scene.sample(model, steps=3), wanted)
    assert len(maps.find(wanted).record.levels) == 3


def test_the_host_can_make_routers_for_another_device(scene: Scene) -> None:
    """Each of its devices gets a module of its own with the same weights."""
    routers = scene.mini.anystory.patchers["routers"]
    make, args = routers.cached_patcher_init
    for options in ({}, {"disable_dynamic": True}):
        other = make(*args, **options)
        assert other.model is not routers.model
        own, copied = routers.model.state_dict(), other.model.state_dict()
        assert own.keys() == copied.keys()
        assert all(torch.equal(own[name], copied[name]) for name in own)
        other.model.requires_grad_(False)
        next(other.model.parameters()).zero_()
    assert any(bool(x.any()) for x in routers.model.parameters())
