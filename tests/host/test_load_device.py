"""What lies on the load device, and when. "cpu:0" stands for it: to the host it is not the memory
in which modules live ("cpu"), so it loads and unloads as it does on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from scene import Scene, halves, module


class Watched:
    """A copy of the mini AnyStory weights whose modules are loaded to a device of their own."""

    def __init__(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = module("comfy.model_management")
        managed = module("anystory_pack.nodes.host.managed")
        with monkeypatch.context() as patched:
            patched.setattr(self.host, "get_torch_device", lambda: torch.device("cpu", 0))
            weights = copy.deepcopy(scene.mini.anystory.model)
            self.anystory = managed.ManagedAnyStory(weights, "watched")
        self.seen: list[set[str]] = []
        # What uses the modules, in the files that call it.
        for place, name in (
            ("host.sdxl.encode", "encode_subject"),
            ("host.sdxl.passes", "prepare_subjects"),
        ):
            user = module(f"anystory_pack.nodes.{place}")
            monkeypatch.setattr(user, name, self.watching(getattr(user, name)))

    def loaded(self) -> set[str]:
        """Names of the modules that the host counts as loaded, in whole or in part."""
        here = [m.model.model for m in self.host.current_loaded_models if m.model is not None]
        named = self.anystory.patchers.items()
        return {
            name
            for name, patcher in named
            if any(patcher.model is x for x in here) and patcher.loaded_size() > 0
        }

    def watching(self, function: Any) -> Any:
        """``function``, noting what is loaded when it is called."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen.append(self.loaded())
            return function(*args, **kwargs)

        return call


@pytest.fixture
def watched(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(scene, monkeypatch)


def test_encoding_leaves_nothing_there(scene: Scene, watched: Watched) -> None:
    subject = scene.encode(0, anystory=watched.anystory)
    assert watched.seen == [{"encoder", "reference_net"}]
    assert watched.loaded() == set()
    assert torch.equal(subject.tokens, scene.encode(0).tokens)


@pytest.mark.parametrize(
    ("mode", "routers"),
    [
        ("learned", {"routers"}),
        ("learned within masks", {"routers"}),
        ("masks", set()),
        ("text", set()),
        ("text within masks", set()),
    ],
)
def test_sampling_keeps_nothing_of_the_weights(
    scene: Scene, watched: Watched, mode: str, routers: set[str]
) -> None:
    """Projections and routers are there while keys are made, and no longer when the U-Net runs."""
    inputs = {f"subject_{i}": s for i, s in enumerate(scene.subjects[:2], 1)}
    if "masks" in mode:
        inputs |= {f"mask_{i}": m for i, m in enumerate(halves(), 1)}
    routing = scene.pack.SubjectRouter.execute(
        anystory=watched.anystory, mode=mode, clip=scene.mini.clip, **inputs
    ).args[0]
    model = scene.apply(routing=routing)

    def unet(run: Any, given: dict[str, Any]) -> Any:
        watched.seen.append(watched.loaded())
        return run(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(unet)
    scene.sample(model, steps=1, cfg=1.0)
    assert watched.seen == [{"projections"} | routers, set()]


def test_others_stay(scene: Scene, watched: Watched) -> None:
    """Releasing some modules takes no other off the same device."""
    managed = module("anystory_pack.nodes.host.managed")
    managed.load(watched.anystory.having("encoder", "projections", "routers"))
    managed.release(watched.anystory.having("projections"))
    assert watched.loaded() == {"encoder", "routers"}
    managed.release(watched.anystory.having("encoder", "routers"))
    assert watched.loaded() == set()
