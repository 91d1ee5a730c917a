"""Modules under the host's memory management: storage types, partial loading, nothing kept."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from scene import Scene, halves, module, picture
from torch import Tensor


def stored_as(scene: Scene, dtype: torch.dtype) -> Any:
    """The mini AnyStory weights as a file in ``dtype`` gives them."""
    managed = module("anystory_pack.nodes.host.managed")
    model = copy.deepcopy(scene.mini.anystory.model)
    for _, inner in model.modules():
        inner.to(dtype)
    return managed.ManagedAnyStory(model, str(dtype))


# Where each subject is, given: one step begins in noise alone, where a router's answers are a
# toss-up that rounding decides.
PLACED = {"mode": "masks", "mask_1": halves()[0], "mask_2": halves()[1]}


def picture_with(scene: Scene, anystory: Any, **routes: Any) -> Tensor:
    subjects = [scene.encode(i, anystory=anystory, label=str(i)) for i in range(2)]
    inputs = {"mode": "learned", **routes}
    routing = scene.pack.SubjectRouter.execute(
        anystory=anystory, subject_1=subjects[0], subject_2=subjects[1], **inputs
    )[0]
    return scene.sample(scene.apply(routing=routing), steps=1, cfg=1.0)


def apart(x: Tensor, exact: Tensor) -> float:
    """Relative distance; 1 for zeros."""
    return float((x.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance", "routed"),
    # Measured 0 (the shipped weights are fp16), 0.006 and 0.08 of a subject, 0.001 and 0.014 of a
    # picture; of one whose places the router chose 0.04 and 0.17, which is only told from one
    # without subjects (0.6).
    [
        (torch.float16, 1e-4, 1e-4),
        (torch.bfloat16, 0.012, 0.3),
        (torch.float8_e4m3fn, 0.2, 0.5),
    ],
)
def test_storage_types(scene: Scene, dtype: torch.dtype, tolerance: float, routed: float) -> None:
    exact = scene.encode(0)
    subject = scene.encode(0, anystory=stored_as(scene, dtype))
    assert apart(subject.tokens, exact.tokens) < tolerance
    assert apart(subject.routing, exact.routing) < tolerance
    for x, y in zip(subject.features, exact.features, strict=True):
        assert apart(x, y) < tolerance
    without = scene.sample(scene.mini.model, steps=1, cfg=1.0)
    for routes, most in ((PLACED, tolerance), ({}, routed)):
        whole = picture_with(scene, scene.mini.anystory, **routes)
        assert apart(picture_with(scene, stored_as(scene, dtype), **routes), whole) < most
        # A picture without the subjects would not pass for one with them.
        assert apart(without, whole) > 0.55


@pytest.mark.parametrize(
    ("flag", "tolerance"),
    # Of what the subjects change; measured 0.002, 0, 0.037.
    [("bf16_unet", 0.006), ("fp16_unet", 1e-3), ("fp8_e4m3fn_unet", 0.11)],
)
def test_unet_types(
    scene: Scene, flag: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's own switches decide the U-Net's type; keys and values follow, and the subjects
    change the picture as they do in float32."""
    placed = scene.route(**PLACED)
    whole = scene.sample(scene.apply(routing=placed), steps=1)
    whole = whole - scene.sample(scene.mini.model, steps=1)
    monkeypatch.setattr(module("comfy.cli_args").args, flag, True)
    model = module("anystory_pack.nodes.mini").load_unet()
    assert model.model.get_dtype() != torch.float32
    out = scene.sample(scene.apply(model, placed), steps=1)
    plain = scene.sample(model, steps=1)
    assert apart(out - plain, whole) < tolerance


def load_partly(patcher: Any, device: str = "cpu") -> tuple[int, int]:
    """Load half of a module's bytes, as a host short of memory does, though a CPU never is:
    (casting layers that were loaded, those that were left where they are)."""
    patcher.detach()
    budget = patcher.model_size() // 2
    patcher.load(torch.device(device), lowvram_model_memory=budget)
    layers = [m for m in patcher.model.modules() if hasattr(m, "comfy_cast_weights")]
    loaded = sum(bool(getattr(m, "comfy_patched_weights", False)) for m in layers)
    return loaded, len(layers) - loaded


@pytest.fixture
def short_of_memory(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """Our modules are loaded partly wherever our code loads them; counts by patcher, at the time
    at which the code that uses them takes over."""
    counts: dict[int, tuple[int, int]] = {}

    def load(patchers: Any, **memory: int) -> None:
        counts.update({id(patcher): load_partly(patcher) for patcher in patchers})

    for name in ("host.sdxl.encode", "host.sdxl.passes"):
        monkeypatch.setattr(module(f"anystory_pack.nodes.{name}"), "load", load)
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_partly_loaded_modules_give_the_same(
    scene: Scene, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """With a budget of half their size, layers are cast where they stand; results are equal."""
    anystory = stored_as(scene, dtype)
    subject = scene.encode(0, anystory=anystory)
    latent = picture_with(scene, anystory)
    counts = request.getfixturevalue("short_of_memory")
    again = scene.encode(0, anystory=anystory)
    assert torch.equal(again.tokens, subject.tokens)
    assert torch.equal(again.routing, subject.routing)
    assert all(torch.equal(a, b) for a, b in zip(again.features, subject.features, strict=True))
    assert torch.equal(picture_with(scene, anystory), latent)
    assert set(counts) == {id(patcher) for patcher in anystory.patchers.values()}
    for loaded, left in counts.values():
        assert loaded > 0 and left > 0


def test_what_is_left_behind_goes_through_casting_layers(scene: Scene) -> None:
    """Nothing mixes devices. "meta" stands for the load device: what is loaded goes there, and an
    operation between it and a tensor that was left on the CPU is an error."""
    anystory = stored_as(scene, torch.float16)
    model, config = anystory.model, anystory.model.config
    for patcher in anystory.patchers.values():
        loaded, left = load_partly(patcher, "meta")
        devices = {p.device.type for p in patcher.model.parameters()}
        assert loaded > 0 and left > 0 and devices == {"cpu", "meta"}

    def there(*shape: int) -> Tensor:
        return torch.zeros(shape, device="meta")

    tokens, routing = model.encoder(there(2, config.clip.tokens, config.clip.width))
    side = config.reference.size // config.reference.latent_stride
    assert model.reference_net is not None and model.routers is not None
    features = model.reference_net(there(1, config.unet.in_channels + 1, side, side))
    made = [tokens, routing, *features]
    for site in model.sites:
        assert model.projections.clip is not None and model.projections.reference is not None
        made.append(model.projections.clip.at(site.index)(tokens).k)
        if site.index > 1:
            feature = features[site.index - 2]
            made.append(model.projections.reference.at(site.index)(feature).v)
        router = model.routers.at(site.index)
        keys = router.prepare(routing[None])
        made.append(keys.logits(there(1, 16, site.channels)).refined)
    assert {x.device.type for x in made} == {"meta"}


def test_subjects_and_models_are_let_go(scene: Scene) -> None:
    """Nothing of ours keeps a subject, a routing or a patched model alive."""
    image, mask = picture(2)
    subject = scene.encode_picture(image, mask=mask, label="gone")
    routing = scene.route(subject)
    model, maps = scene.apply_with_maps(routing=routing)
    scene.sample(model, steps=1)
    watched = [weakref.ref(x) for x in (subject, routing, model, maps)]
    del subject, routing, model, maps
    gc.collect()
    module("comfy.model_management").cleanup_models()
    gc.collect()
    assert [w() for w in watched] == [None] * 4


def test_projected_keys_do_not_outlive_the_run(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    prepare = scene.passes.prepare_subjects

    def spy(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        made.append(weakref.ref(prepared))
        return prepared

    monkeypatch.setattr(scene.passes, "prepare_subjects", spy)
    model = scene.apply()
    scene.sample(model, steps=1)
    gc.collect()
    assert [run() for run in made] == [None]
