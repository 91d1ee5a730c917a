"""What RoutingMapPreview finds again and shows: it says what is missing and fails no prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scene import Scene, halves, module
from torch import Tensor

SEVERAL = 4  # pictures in a batch


def said(output: Any) -> str:
    return " ".join(output.ui["text"])


def shows(output: Any) -> bool:
    """Whether there are routes for the viewer."""
    return bool(output.ui["anystory_routes"])


def prompt(name: str, node: str) -> Any:
    """What the host says of the node that runs."""
    return module("comfy_execution.utils").CurrentNodeContext(name, node)


def sockets() -> Any:
    return module("anystory_pack.nodes.host.sockets")


def same(one: Any, other: Any) -> bool:
    """Whether two previews show the same routes and masks."""
    return all(torch.equal(a, b) for a, b in zip(one.args, other.args, strict=True))


# Which run a latent is from


def test_a_picked_picture_is_found(scene: Scene) -> None:
    model, maps = scene.apply_with_maps()
    batch = scene.sample(model, latent_image=scene.latent(batch=SEVERAL))
    pick = scene.comfy.LatentFromBatch().frombatch
    picked = pick({"samples": batch}, 2, 1)[0]["samples"]
    wanted = [scene.preview(maps, batch, batch_index=row) for row in range(SEVERAL)]
    assert same(scene.preview(maps, picked), wanted[2])
    assert not same(wanted[2], wanted[0])
    two = pick({"samples": batch}, 1, 2)[0]["samples"]
    assert same(scene.preview(maps, two, batch_index=1), wanted[2])
    image = torch.rand(1, 128, 128, 3)
    assert len(scene.preview(maps, picked, image=image).ui["images"]) == 2


def test_pictures_of_several_runs_in_one_batch(scene: Scene) -> None:
    model, maps = scene.apply_with_maps()
    runs = [scene.sample(model, seed=seed) for seed in (3, 4)]
    alone = [scene.preview(maps, latent) for latent in runs]
    for row in range(2):
        assert same(scene.preview(maps, torch.cat(runs), batch_index=row), alone[row])


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_the_denoised_output_is_found(scene: Scene, sampler: str) -> None:
    """What SamplerCustom gives beside its result, where the last step leaves noise."""
    model, maps = scene.apply_with_maps()
    custom = module("comfy_extras.nodes_custom_sampler")
    samplers = module("comfy.samplers")
    sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)[:-1]
    result, denoised = custom.SamplerCustom.execute(
        model, True, 1, 5.0, scene.positive, scene.negative, samplers.sampler_object(sampler),
        sigmas, scene.latent(),
    ).args  # fmt: skip
    assert not torch.equal(result["samples"], denoised["samples"])
    shown = scene.preview(maps, denoised["samples"])
    assert same(shown, scene.preview(maps, result["samples"])) and shows(shown)


def test_a_composed_latent_shows_the_run_that_gave_most_of_it(scene: Scene) -> None:
    """As RegionalSampler and TwoSamplersForMask do: one run pasted into another one's result."""
    model, maps = scene.apply_with_maps()
    below, above = ({"samples": scene.sample(model, seed=seed)} for seed in (3, 4))
    mask = torch.zeros(1, 128, 128)
    mask[:, :, :40] = 1
    compose = module("comfy_extras.nodes_mask").LatentCompositeMasked().composite
    composed = compose(below, above, 0, 0, False, mask)[0]["samples"]
    assert not torch.equal(composed, below["samples"])
    shown = scene.preview(maps, composed)
    assert same(shown, scene.preview(maps, below["samples"]))
    assert "put together after sampling. 69 %" in said(shown)


def test_a_composed_latent_of_a_run_that_was_not_ours(scene: Scene) -> None:
    """Only the region was sampled with subjects."""
    model, maps = scene.apply_with_maps()
    plain, ours = scene.sample(scene.mini.model, seed=3), scene.sample(model, seed=4)
    composed = plain.clone()
    composed[..., :6, :6] = ours[..., :6, :6]
    shown = scene.preview(maps, composed)
    assert same(shown, scene.preview(maps, ours)) and "14 % of it" in said(shown)


def test_another_sampler_that_goes_on_outside_of_a_mask(scene: Scene) -> None:
    """As TwoSamplersForMask, the sampler without subjects last."""
    model, maps = scene.apply_with_maps()
    ours = scene.sample(model, seed=4)
    outside = torch.ones(1, 128, 128)
    outside[:, :, 64:] = 0
    last = scene.sample(
        scene.mini.model, seed=5, steps=3, latent_image={"samples": ours, "noise_mask": outside}
    )
    for latent in (last, last * 1.0005):  # its own scaling there and back rounds
        shown = scene.preview(maps, latent)
        assert same(shown, scene.preview(maps, ours)) and "50 % of it" in said(shown)


def test_a_latent_that_another_node_changed(scene: Scene) -> None:
    """No value is that of a run; the last run of the same prompt is shown, and this is said."""
    model, maps = scene.apply_with_maps()
    with prompt("one", "sampler"):
        first = scene.sample(model, seed=3)
        last = scene.sample(model, seed=4)
    with prompt("one", "preview"):
        shown = scene.preview(maps, last * 0.5 + first * 0.5)
        assert "the last run of this prompt" in said(shown)
        assert same(shown, scene.preview(maps, last))
        larger = torch.nn.functional.interpolate(last, size=(24, 24))
        assert scene.preview(maps, larger).args[1].shape == (2, 192, 192)
        wide = torch.nn.functional.interpolate(last, size=(16, 24))  # no picture of these routes
        assert not shows(scene.preview(maps, wide))
    with prompt("two", "preview"):  # where no run belongs to it
        shown = scene.preview(maps, last * 0.5 + first * 0.5)
        assert "change the seed, or clear the cache" in said(shown) and not shows(shown)


@pytest.mark.parametrize("what", ["row", "image", "steps", "shape", "another size"])
def test_what_does_not_fit_is_said(scene: Scene, what: str) -> None:
    model, maps = scene.apply_with_maps()
    out = scene.sample(model, latent_image=scene.latent(batch=2))
    given: dict[str, dict[str, Any]] = {
        "row": {"batch_index": 7},
        "image": {"batch_index": 1, "image": torch.rand(1, 128, 128, 3)},
        "steps": {"steps": "first, 1"},
    }
    latents = {"shape": torch.zeros(1, 16, 3, 8, 8), "another size": torch.zeros(1, 4, 9, 31)}
    words = {
        "row": "batch_index: got 7, the latent batch has 2",
        "image": "image: got a batch of 1, without picture 1",
        "steps": "steps: got 'first, 1', expected 'all', 'last' or numbers from 1 to 2",
        "shape": "expected (batch, channels, height, width)",
        "another size": "No recorded run returned this latent",
    }
    shown = scene.preview(maps, latents.get(what, out), **given.get(what, {}))
    assert words[what] in said(shown)
    assert shown.ui.keys() == scene.preview(maps, out).ui.keys()
    assert shows(shown) == (what not in latents)


def test_a_run_too_large_for_the_viewer_has_its_figure(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, maps = scene.apply_with_maps()
    out = scene.sample(model)
    monkeypatch.setattr(module("anystory_pack.anystory_core.pictures.atlas"), "_MAX_PIXELS", 99)
    shown = scene.preview(maps, out, image=torch.rand(1, 128, 128, 1))
    assert "too many for the viewer" in said(shown) and not shows(shown)
    assert len(shown.ui["images"]) == 2 and shown.args[0].any()


def test_steps_as_text(scene: Scene) -> None:
    model, maps = scene.apply_with_maps()
    out = scene.sample(model)
    last = scene.preview(maps, out, steps="last")
    for text in ("0", "first", "-1", "1.5", ""):
        shown = scene.preview(maps, out, steps=text)
        assert f"steps: got {text!r}, expected 'all', 'last' or numbers from 1 to 2" in said(shown)
        assert same(shown, last)
    shown = scene.preview(maps, out, steps="9")
    assert "steps: got '9', but the run has 2 steps" in said(shown) and same(shown, last)
    both = scene.preview(maps, out, steps="1, last")
    shown = scene.preview(maps, out, steps="1, 2, 25, last")
    assert same(shown, both) and "steps" not in said(shown)


# Which runs are kept


def test_a_sampler_that_the_host_caches_can_be_shown(scene: Scene) -> None:
    """One Apply, two samplers; the second one's seed changes five times, then the first preview
    gets another setting."""
    model, maps = scene.apply_with_maps()
    with prompt("0", "first"):
        first = scene.sample(model, seed=1, steps=1)
    for seed in range(5):
        with prompt(str(seed), "second"):
            scene.sample(model, seed=10 + seed, steps=1)
    shown = scene.preview(maps, first, show_background=True)
    assert shows(shown) and "No recorded run" not in said(shown)


def test_bytes_alone_decide_and_cached_results_stay(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that their node has repeated go first: the host has only its last result."""
    model, maps = scene.apply_with_maps()
    with prompt("0", "first"):
        first = scene.sample(model, seed=1, steps=1)
    (kept,) = maps.runs
    monkeypatch.setattr(sockets(), "MOST_BYTES", 3 * kept.size + kept.size // 2)
    latents: list[Tensor] = []
    for seed in range(5):
        with prompt(str(seed), "second"):
            latents.append(scene.sample(model, seed=10 + seed, steps=1))
    assert len(maps.runs) == 3
    assert shows(scene.preview(maps, first))
    assert shows(scene.preview(maps, latents[-1]))
    gone = scene.preview(maps, latents[0])
    assert "gave way" in said(gone) and not shows(gone)
    # A list in one prompt is many results of one node: then the oldest go.
    with prompt("a list", "second"):
        listed = [scene.sample(model, seed=20 + i, steps=1) for i in range(5)]
    assert [shows(scene.preview(maps, latent)) for latent in listed] == [
        False, False, True, True, True,
    ]  # fmt: skip


def test_a_run_larger_than_the_limit_is_kept_alone(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, maps = scene.apply_with_maps()
    scene.sample(model, seed=1, steps=1)
    monkeypatch.setattr(sockets(), "MOST_BYTES", 1)
    out = scene.sample(model, seed=2, steps=1)
    assert len(maps.runs) == 1 and shows(scene.preview(maps, out))


# What the sampler calls


def in_windows(model: Any, length: int, overlap: int) -> Any:
    node = module("comfy_extras.nodes_context_windows").ContextWindowsManualNode
    return node.execute(
        model, length, overlap, "standard_static", 1, False, "pyramid", 0
    ).args[0]  # fmt: skip


def sample_batch(scene: Scene, model: Any, batch: int) -> Tensor:
    """This host's windows want as many noise levels as pictures: one step less."""
    return scene.sample(model, latent_image=scene.latent(batch=batch), steps=batch - 1)


def test_context_windows_show_every_picture(scene: Scene) -> None:
    """Six pictures, four at a time."""
    model, maps = scene.apply_with_maps()
    out = sample_batch(scene, in_windows(model, 4, 2), 6)
    record = maps.find(out).record
    assert record.rows == 6 and record.steps == 5
    for row in range(6):
        assert all(level.shows(row) for level in record.levels)
        shown = scene.preview(maps, out, batch_index=row)
        assert shows(shown) and "No routes" not in said(shown)


def test_a_picture_is_recorded_alike_in_windows_and_without(scene: Scene) -> None:
    model, maps = scene.apply_with_maps()
    alone, parts = (
        maps.find(sample_batch(scene, each, 5)).record for each in (model, in_windows(model, 2, 0))
    )
    assert alone is not parts
    for row in range(5):
        for index in alone.blocks:
            one, other = (record.levels[0].map(index, row) for record in (alone, parts))
            # Other batch sizes round otherwise: a tie may fall to the other side.
            assert (one != other).float().mean() < 0.05


def test_equal_pictures_in_windows_are_all_shown(scene: Scene) -> None:
    """A batch of one seed: what a window shows cannot be told by its values."""
    model, maps = scene.apply_with_maps()
    latent = scene.latent(batch=4) | {"batch_index": [0] * 4}
    windowed = in_windows(model, 2, 0)
    out = scene.sample(windowed, latent_image=latent, steps=3)
    assert torch.equal(out[0], out[1])
    record = maps.find(out).record
    assert all(level.shows(row) for level in record.levels for row in range(4))


@pytest.mark.parametrize("cache", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_steps_that_a_cache_skips_keep_their_numbers(
    scene: Scene, cache: str, before: bool
) -> None:
    node = getattr(module("comfy_extras.nodes_easycache"), cache)

    def cached(model: Any) -> Any:
        return node.execute(model, 1.0, 0.1, 0.9, False).args[0]

    if before:
        model, maps = scene.apply_with_maps(cached(scene.mini.model))
    else:
        model, maps = scene.apply_with_maps()
        model = cached(model)
    out = scene.sample(model, steps=8)
    record = maps.find(out).record
    shown = {level.step for level in record.levels if level.shows(0)}
    assert {0, 7} <= shown and len(shown) < 8 and record.steps == 8
    sigmas = record.schedule
    for level in record.levels:
        assert level.sigma == pytest.approx(sigmas[level.step])
    everything = scene.preview(maps, out, steps="all")
    skipped = min(set(range(8)) - shown) + 1
    assert f"No routes at step {skipped}" in said(everything) and "of 8" in said(everything)


@pytest.mark.parametrize("sampler", ["dpm_adaptive", "dpm_fast", "res_multistep", "dpm_2", "heun"])
def test_levels_are_numbered_by_their_noise(scene: Scene, sampler: str) -> None:
    """Every noise level at which the model was called, in the step that holds it."""
    called: list[float] = []
    model, maps = scene.apply_with_maps()

    def spy(apply: Any, given: dict[str, Any]) -> Tensor:
        called.append(float(given["timestep"][0]))
        return apply(given["input"], given["timestep"], **given["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(spy)
    out = scene.sample(model, sampler_name=sampler, steps=6)
    record = maps.find(out).record
    assert record.steps == 6
    distinct = sorted({round(sigma, 4) for sigma in called}, reverse=True)
    assert [round(level.sigma, 4) for level in record.levels] == distinct
    schedule = record.schedule
    if sampler not in ("dpm_adaptive", "dpm_fast"):
        assert {level.step for level in record.levels} == set(range(6))
    for level in record.levels:
        assert level.shows(0)
        low, high = schedule[level.step + 1], schedule[level.step]
        assert low < level.sigma <= high * 1.0001 or sampler.startswith("dpm_")
    text = said(scene.preview(maps, out, steps="all"))
    steps = {level.step for level in record.levels}
    assert ("No routes at step" in text) == (len(steps) < 6)


def test_all_steps_of_a_long_run_say_that_some_are_left_out(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = module("anystory_pack.anystory_core.pictures.figure")
    model, maps = scene.apply_with_maps(routing=scene.route(mode="masks", masks=halves()))
    out = scene.sample(model, steps=6)
    one = scene.preview(maps, out, steps="1").args[0]
    monkeypatch.setattr(figure, "MOST_PIXELS", 3 * one.shape[1] * one.shape[2])
    shown = scene.preview(maps, out, steps="all")
    assert "of the 6 steps that were chosen" in said(shown)
    assert shown.args[0].shape[1] * shown.args[0].shape[2] <= figure.MOST_PIXELS
    assert len(shown.ui["anystory_routes"][0]["layout"]["steps"]) == 6
