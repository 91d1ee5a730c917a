"""Nothing active is bit-identical to no pack; nothing of a run outlives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scene import Scene, halves, module
from torch import Tensor


def trace(model: Any) -> dict[str, Any]:
    """All that a pack can leave on a ModelPatcher, in comparable form."""
    options = model.model_options
    return {
        "patches": {k: len(v) for k, v in model.patches.items()},
        "object_patches": sorted(model.object_patches),
        "wrappers": {k: {n: len(w) for n, w in v.items()} for k, v in model.wrappers.items()},
        "callbacks": {k: {n: len(w) for n, w in v.items()} for k, v in model.callbacks.items()},
        "additional": {k: len(v) for k, v in model.additional_models.items()},
        "options": sorted(options),
        "transformer_options": {
            k: sorted(map(str, v)) if isinstance(v, dict) else repr(v)
            for k, v in options["transformer_options"].items()
        },
    }


@pytest.fixture(scope="module")
def plain(scene: Scene) -> Tensor:
    return scene.sample(scene.mini.model)


def weak(scene: Scene, **options: Any) -> Any:
    node = scene.pack.AnyStorySubjectOptions
    given = {"strength": 1.0, "reference_strength": 1.0, "start": 0.0, "end": 1.0, **options}
    return scene.route(*(node.execute(s, **given).args[0] for s in scene.subjects[:2]))


IDLE: dict[str, Any] = {
    "strengths 0": lambda s: s.apply(strength=0.0, reference_strength=0.0),
    "window closed": lambda s: s.apply(start=0.5, end=0.5),
    "windows that never meet": lambda s: s.apply(routing=weak(s, end=0.3), start=0.6),
    "subjects at strength 0": lambda s: s.apply(
        routing=weak(s, strength=0.0, reference_strength=0.0)
    ),
    "no subjects": lambda s: s.apply(
        routing=s.pack.SubjectRouter.execute(anystory=s.mini.anystory, mode="learned").args[0]
    ),
}


@pytest.mark.parametrize("name", IDLE)
def test_idle_is_bit_identical(scene: Scene, plain: Tensor, name: str) -> None:
    assert torch.equal(scene.sample(IDLE[name](scene)), plain)


def test_active_differs_and_the_model_is_untouched_after(scene: Scene, plain: Tensor) -> None:
    source = trace(scene.mini.model)
    patched = scene.apply()
    mine = trace(patched)
    first = scene.sample(patched)
    assert not torch.allclose(first, plain, rtol=0.01, atol=0.01)
    assert trace(scene.mini.model) == source
    assert trace(patched) == mine
    assert torch.equal(scene.sample(scene.mini.model), plain)
    assert torch.equal(scene.sample(patched), first)


def test_apply_twice_from_one_cached_model(scene: Scene) -> None:
    source = trace(scene.mini.model)
    first, second = scene.apply(), scene.apply()
    assert trace(scene.mini.model) == source
    assert trace(first) == trace(second)
    assert torch.equal(scene.sample(first), scene.sample(second))


def test_two_strengths_from_one_model_do_not_mix(scene: Scene) -> None:
    strong, light = scene.apply(strength=2.0), scene.apply(strength=0.2)
    a, b = scene.sample(strong), scene.sample(light)
    assert not torch.allclose(a, b, rtol=0.01, atol=0.01)
    assert torch.equal(scene.sample(strong), a)


def test_clones_of_the_patched_model_work_alike(scene: Scene) -> None:
    patched = scene.apply()
    clone = patched.clone().clone()
    assert torch.equal(scene.sample(clone), scene.sample(patched))


def test_steps_outside_the_window_are_plain(scene: Scene) -> None:
    """Noise of step 1 goes through the plain model when subjects begin later."""
    first: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def callback(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
            first.setdefault(f"{name}{step}", denoised.clone())

        return callback

    for name, model in (("plain", scene.mini.model), ("late", scene.apply(start=0.5))):
        run(scene, model, watch(name), steps=4)
    assert torch.equal(first["plain0"], first["late0"])
    assert not torch.equal(first["plain3"], first["late3"])


def run(scene: Scene, model: Any, callback: Any, steps: int = 3) -> Tensor:
    """As KSampler, with a callback."""
    sample = module("comfy.sample")
    latent = scene.latent()["samples"]
    noise = sample.prepare_noise(latent, 1, None)
    return sample.sample(
        model, noise, steps, 5.0, "euler", "normal", scene.positive, scene.negative, latent,
        callback=callback, disable_pbar=True, seed=1,
    )  # fmt: skip


def test_an_empty_window_holds_nothing(scene: Scene) -> None:
    """Where start equals end, a step may fall on just that noise level."""
    window = module("anystory_pack.nodes.host.windows").Window
    assert window(5.0, 5.0).holds(5.0) is False
    assert [window(5.0, 4.0).holds(sigma) for sigma in (5.5, 5.0, 4.0, 3.5)] == [0, 1, 1, 0]


@pytest.mark.parametrize("stop", [0, 1])
def test_cancel_then_run_again(scene: Scene, stop: int) -> None:
    interrupted = module("comfy.model_management").InterruptProcessingException
    model, maps = scene.apply_with_maps()
    fresh = run(scene, model, None)
    plain = run(scene, scene.mini.model, None)
    before = trace(model)

    def cancel(step: int, *_: Any) -> None:
        if step == stop:
            raise interrupted

    runs = list(maps.runs)
    with pytest.raises(interrupted):
        run(scene, model, cancel)
    assert trace(model) == before
    assert maps.runs == runs
    assert torch.equal(run(scene, scene.mini.model, None), plain)
    assert torch.equal(run(scene, model, None), fresh)


def test_maps_belong_to_their_latent(scene: Scene) -> None:
    """Seeds A, B, A in one host: each preview shows the run of its own latent."""
    model, maps = scene.apply_with_maps()
    latents = [scene.sample(model, seed=seed) for seed in (11, 12)]
    shown = [scene.preview(maps, latent).args for latent in latents]
    again = scene.sample(model, seed=11)
    assert torch.equal(again, latents[0])
    for latent, (routes, masks) in zip(latents, shown, strict=True):
        now = scene.preview(maps, latent).args
        assert torch.equal(now[0], routes) and torch.equal(now[1], masks)
    assert not torch.equal(shown[0][0], shown[1][0])


def test_maps_of_a_latent_that_the_host_rounded(scene: Scene) -> None:
    """With --fp16-intermediates the sampler samples in float32 and returns float16."""
    model, maps = scene.apply_with_maps()
    latent = scene.sample(model, steps=1)
    assert maps.find(latent.half()).record is maps.find(latent).record


# Exchanging the subjects exchanges the order of candidates in sums and softmaxes, and a by-region
# attention over other slices: float32 rounding, carried through two steps of a random network.
ROUNDING = {"rtol": 1e-3, "atol": 1e-3}


def test_exchanging_subjects_exchanges_their_regions(scene: Scene) -> None:
    a, b = scene.subjects[:2]
    (model, maps), (swapped, swapped_maps) = (
        scene.apply_with_maps(routing=scene.route(*pair)) for pair in ((a, b), (b, a))
    )
    one, two = scene.sample(model), scene.sample(swapped)
    scale = one.abs().max()
    torch.testing.assert_close(one / scale, two / scale, **ROUNDING)
    ids, other = (m.find(x).record.levels[0].ids for m, x in ((maps, one), (swapped_maps, two)))
    exchanged = torch.tensor([1, 0, 2], dtype=torch.uint8)
    for block, route in ids.items():
        different = (exchanged[route.long()] != other[block]).float().mean()
        assert different <= 0.02, f"block {block}"  # ties within rounding


def test_the_same_subject_twice_equals_once(scene: Scene) -> None:
    a = scene.subjects[0]
    left = halves()[0]
    once = scene.sample(scene.apply(routing=scene.route(a, mode="masks", masks=[left])))
    twice = scene.sample(scene.apply(routing=scene.route(a, a, mode="masks", masks=[left, left])))
    # The second one's keys are masked, but the kernel sums over twice as many; 7e-6 was measured.
    scale = once.abs().max()
    torch.testing.assert_close(once / scale, twice / scale, rtol=0, atol=5e-5)


def test_another_picture_of_a_subject_changes_the_result(scene: Scene) -> None:
    a, b, c = scene.subjects
    one = scene.sample(scene.apply(routing=scene.route(a, b)))
    other = scene.sample(scene.apply(routing=scene.route(a, c)))
    assert not torch.allclose(one, other, rtol=0.01, atol=0.01)
