"""References at the noise of the step, in the host: what goes through the model, and what stays as
it was."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Generator
from typing import Any

import others
import pytest
import torch
from scene import Scene, halves, module, picture
from torch import Tensor

WHICH = ("matched noise", "masked, matched noise")
NOISED = {"references": WHICH[0]}


@dataclasses.dataclass
class Passes:
    """What the U-Net itself was given: x, timesteps, text, y and options of each pass."""

    seen: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)

    def of_references(self, scene: Scene) -> list[tuple[Any, ...]]:
        kind = module("anystory_pack.anystory_core.injection.matched").ReferencePass
        return [p for p in self.seen if isinstance(p[5].get(scene.ids.CALL_KEY), kind)]


@contextlib.contextmanager
def watched(model: Any) -> Generator[Passes, None, None]:
    """Every pass of a model's U-Net, behind all wrappers around it."""
    unet, passes = model.model.diffusion_model, Passes()
    inner = unet._forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        passes.seen.append(args)
        return inner(*args, **kwargs)

    unet._forward = forward
    try:
        yield passes
    finally:
        del unet._forward


def subject(scene: Scene, number: int = 0, label: str = "ball") -> Any:
    """One that knows its label's text."""
    return scene.encode(number, label=label, clip=scene.mini.clip)


def test_the_pictures_of_a_subject_are_noised_to_the_level(scene: Scene) -> None:
    """x = (z + sigma n) / sqrt(sigma^2 + 1) in float64, with the timestep of the run, the label's
    text and the run's sizes; once for each step, whatever number of conds there are."""
    one = subject(scene)
    with watched(scene.mini.model) as passes:
        scene.sample(scene.apply(routing=scene.route(one), **NOISED), steps=3)
    reading = passes.of_references(scene)
    others_ = [p for p in passes.seen if not any(p is r for r in reading)]
    assert len(reading) == 3 and len(others_) == 3
    noise_of = module("anystory_pack.anystory_core.injection.matched").noise_of
    states = scene.text("ball")[0]
    for (x, t, text, y, control, options), (_, run_t, _, run_y, *_) in zip(
        reading, others_, strict=True
    ):
        sigma = float(options["sigmas"][0])
        z = one.latents[0].double()
        wanted = (z + sigma * noise_of(0, sigma, one.latents[0].float()).double()) / (
            sigma**2 + 1
        ) ** 0.5
        assert torch.allclose(x[0].double(), wanted, atol=1e-5)
        assert torch.equal(t, run_t[:1]) and control is None
        assert torch.allclose(text[0].float(), states[0][0].float(), atol=1e-5)
        pooled = states[1]["pooled_output"][0]
        assert torch.allclose(y[0, : len(pooled)].float(), pooled.float(), atol=1e-5)
        assert torch.equal(y[0, len(pooled) :], run_y[0, len(pooled) :])


@pytest.mark.parametrize("which", WHICH)
def test_what_the_blocks_attend_to(
    scene: Scene, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block l has the keys and values that its own maps make of the pictures' tokens in that pass:
    of all, or of those inside the mask, two pictures side by side."""
    images, masks = zip(*(picture(n) for n in (0, 1)), strict=True)
    both = scene.encode_picture(torch.cat(images), mask=torch.cat(masks), label="thing")
    unet, made = scene.mini.model.model.diffusion_model, {}
    handles = []
    kind = module("anystory_pack.anystory_core.injection.matched").ReferencePass
    running: list[Any] = []
    before = kind.self_attention

    def enter(self: Any, index: int, q: Tensor, k: Tensor, v: Tensor, grid: Any) -> None:
        made[index] = (k.clone(), v.clone(), grid)
        running.append(self)
        return before(self, index, q, k, v, grid)

    monkeypatch.setattr(kind, "self_attention", enter)
    calls: list[Any] = []
    call = scene.passes.Call

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(call(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(scene.passes, "Call", spy)
    hidden: dict[int, Tensor] = {}
    for site in scene.mini.anystory.model.sites:
        block = unet.get_submodule(site.ldm)

        def keep(_: Any, given: Any, out: Tensor, index: int = site.index) -> None:
            if index not in hidden:
                hidden[index] = out.clone()  # norm1 of the first pass, which is the pictures'

        handles.append(block.norm1.register_forward_hook(keep))
    size = {"latent_image": scene.latent(192, 192)}  # as large as the pictures: one pass for both
    scene.sample(scene.apply(routing=scene.route(both), references=which), steps=1, **size)
    for handle in handles:
        handle.remove()
    (one,) = calls
    inside = both.inside
    for site in scene.mini.anystory.model.sites[1:]:
        block = unet.get_submodule(site.ldm).attn1
        grid = made[site.index][2]
        share = torch.nn.functional.adaptive_avg_pool2d(inside[:, None], grid).flatten(1)
        kept = [range(share.shape[1])] * 2
        if which.startswith("masked"):
            kept = [
                [p for p, s in enumerate(row.tolist()) if s >= 0.5] or [int(row.argmax())]
                for row in share
            ]
        got = one.prepared.conditions[site.index - 1].reference[0]
        for maps, have in ((block.to_k, got.k), (block.to_v, got.v)):
            whole = maps(hidden[site.index])
            wanted = torch.cat([whole[row, list(places)] for row, places in enumerate(kept)])
            assert torch.allclose(have[0], wanted, atol=1e-5), site.index
    assert any(len(places) < s for places, s in zip(kept, map(len, share), strict=True)) == (
        which.startswith("masked")
    )


def test_it_changes_the_picture_and_each_kind_its_own_way(scene: Scene) -> None:
    routing = scene.route(subject(scene), subject(scene, 1, "box"), mode="masks", masks=halves())
    drawn = [
        scene.sample(scene.apply(routing=routing, references=which), steps=1)
        for which in ("whole", *WHICH)
    ]
    off = scene.sample(scene.apply(routing=routing, reference_strength=0.0, **NOISED), steps=1)
    without = scene.sample(scene.apply(routing=routing, reference_strength=0.0), steps=1)
    assert torch.equal(off, without)
    for i, one in enumerate((*drawn, off)):
        for other in (*drawn, off)[i + 1 :]:
            assert not torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("split")
def test_one_pass_a_step_and_conditional_rows_alone(scene: Scene) -> None:
    """Conds that are calls of their own share what was read; and a call of unconditional rows is,
    to the bit, what it is with references that are off."""
    routing = scene.route(subject(scene))
    drawn: dict[str, list[Tensor]] = {}
    for name, settings in (("on", NOISED), ("off", {**NOISED, "reference_strength": 0.0})):
        model = scene.apply(routing=routing, **settings)
        given: list[tuple[Any, Tensor]] = []

        def watch(args: dict[str, Any], given: list[Any] = given) -> Tensor:
            given.append(args["uncond_denoised"].clone())
            return args["denoised"]

        model.set_model_sampler_post_cfg_function(watch)
        with watched(scene.mini.model) as passes:
            scene.sample(model, steps=1)
        drawn[name] = given
        assert len(passes.of_references(scene)) == (1 if name == "on" else 0)
        assert len(passes.seen) == 2 + len(passes.of_references(scene))
    assert all(map(torch.equal, drawn["on"], drawn["off"]))


def test_outside_its_window_nothing_is_read(scene: Scene) -> None:
    """Those steps equal the ones without references; an empty window is none at all."""
    routing = scene.route(subject(scene))
    with watched(scene.mini.model) as passes:
        late = scene.sample(scene.apply(routing=routing, matched_start=0.6, **NOISED), steps=4)
    sigmas = [float(p[5]["sigmas"][0]) for p in passes.of_references(scene)]
    all_levels = {float(p[5]["sigmas"][0]) for p in passes.seen}
    border = float(scene.mini.model.get_model_object("model_sampling").percent_to_sigma(0.6))
    assert sorted(sigmas) == sorted(level for level in all_levels if level <= border)
    assert 0 < len(sigmas) < 4
    none = scene.sample(scene.apply(routing=routing, reference_strength=0.0), steps=4)
    empty = scene.apply(routing=routing, matched_start=1.0, matched_end=1.0, **NOISED)
    assert torch.equal(scene.sample(empty, steps=4), none)
    assert not torch.equal(late, none)
    idle = scene.apply(routing=routing, strength=0.0, reference_strength=0.0, **NOISED)
    assert torch.equal(scene.sample(idle), scene.sample(scene.mini.model))


def test_nothing_of_the_pass_is_recorded_or_seen_by_wrappers(scene: Scene) -> None:
    """Wrappers around the U-Net, patches of other packs and the record know the run's passes
    alone."""
    wrapped: list[Any] = []
    patched: list[int] = []

    def wrapper(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wrapped.append(x.shape)
        return executor(x, *args, **kwargs)

    def patch(q: Tensor, k: Tensor, v: Tensor, options: Any) -> Any:
        patched.append(q.shape[0])
        return q, k, v

    model = others._around_unet(scene.mini.model, wrapper)
    model.set_model_attn1_patch(patch)
    routing = scene.route(subject(scene))
    applied, maps = scene.apply_with_maps(model, routing, **NOISED)
    plain, plain_maps = scene.apply_with_maps(model, routing)
    latent = scene.sample(applied, steps=2)
    assert len(wrapped) == 2 and set(patched) == {2}
    counted = len(patched)
    scene.sample(plain, steps=2)
    assert len(wrapped) == 4 and len(patched) == 2 * counted
    record, usual = maps.runs[-1].record, plain_maps.runs[-1].record
    assert [level.sigma for level in record.levels] == [level.sigma for level in usual.levels]
    assert record.blocks == usual.blocks
    assert maps.find(latent).record is record


def test_caches_count_the_runs_own_passes(scene: Scene) -> None:
    """The host's EasyCache, with a threshold that leaves steps out: those read nothing."""
    routing = scene.route(subject(scene))
    cache = module("comfy_extras.nodes_easycache").EasyCacheNode
    for threshold, steps in ((0.0, 8), (1e3, 8)):
        model = cache.execute(scene.apply(routing=routing, **NOISED), threshold, 0.15, 0.95, False)[
            0
        ]
        with watched(scene.mini.model) as passes:
            scene.sample(model, steps=steps)
        reading = len(passes.of_references(scene))
        assert len(passes.seen) == 2 * reading
        assert reading == steps if threshold == 0 else 0 < reading < steps


def test_loras_act_in_it(scene: Scene) -> None:
    """What is read comes from the weights that draw."""
    routing = scene.route(subject(scene))
    read: list[Tensor] = []
    for model in (scene.mini.model, others.lora(scene, scene.mini.model)):
        with watched(model) as passes:
            scene.sample(scene.apply(model, routing, **NOISED), steps=1)
        (reading,) = passes.of_references(scene)
        read.append(reading[5][scene.ids.CALL_KEY].found[9][0].k.clone())
    assert not torch.allclose(*read, rtol=1e-3, atol=1e-3)


def test_batches_and_several_pictures(scene: Scene) -> None:
    """Each row of a batch is drawn as it is alone; the pictures of all subjects are one pass."""
    images, masks = zip(*(picture(n) for n in (0, 1)), strict=True)
    both = scene.encode_picture(torch.cat(images), mask=torch.cat(masks), label="thing")
    routing = scene.route(both, subject(scene, 2, "kite"), mode="masks", masks=halves())
    model = scene.apply(routing=routing, **NOISED)
    with watched(scene.mini.model) as passes:
        batch = scene.sample(model, latent_image=scene.latent(192, 192, batch=2), steps=1)
    (reading,) = passes.of_references(scene)
    assert reading[0].shape[0] == 3
    noise = module("comfy.sample").prepare_noise(scene.latent(192, 192, 2)["samples"], 1, None)
    sample = module("comfy.sample").sample
    alone = sample(
        model, noise[1:], 1, 5.0, "euler", "normal", scene.positive, scene.negative,
        scene.latent(192, 192)["samples"], disable_pbar=True, seed=1,
    )  # fmt: skip
    assert torch.allclose(batch[1:], alone, atol=2e-3)  # sums of other shapes


@pytest.mark.parametrize("wrapper", [others.tiles, others.batched_tiles, others.second_pass])
def test_tiles_and_further_passes_share_what_was_read(scene: Scene, wrapper: others.Patch) -> None:
    """One reading a step, however often other packs run the U-Net in it."""
    routing = scene.route(subject(scene), subject(scene, 1, "box"), mode="masks", masks=halves())
    plain = scene.sample(wrapper(scene, scene.apply(routing=routing, references="off")), steps=2)
    with watched(scene.mini.model) as passes:
        drawn = scene.sample(wrapper(scene, scene.apply(routing=routing, **NOISED)), steps=2)
    # A pass for each of two subjects, whose pictures are larger than the tiles.
    assert len(passes.of_references(scene)) == 4
    assert not torch.allclose(drawn, plain, rtol=1e-3, atol=1e-3)


def test_without_a_label_the_text_is_empty(scene: Scene) -> None:
    with watched(scene.mini.model) as passes:
        scene.sample(scene.apply(routing=scene.route(scene.subjects[0]), **NOISED), steps=1)
    (reading,) = passes.of_references(scene)
    assert not reading[2].any()


def test_a_model_that_reads_more_than_a_latent_is_named(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scene.mini.model.model.diffusion_model, "in_channels", 9)
    model = scene.apply(routing=scene.route(scene.subjects[0]), **NOISED)
    with pytest.raises(scene.errors.ModelMismatchError, match="ApplyAnyStory|reads 9 channels"):
        scene.sample(model)


def test_another_encoders_pooled_state_is_named(scene: Scene) -> None:
    texts = module("anystory_pack.nodes.host.texts")
    clip = dataclasses.make_dataclass("Clip", ["tokenize", "encode_from_tokens"])(
        lambda text: text, lambda tokens, return_pooled: (None, torch.zeros(1, 5))
    )
    with pytest.raises(scene.errors.ModelMismatchError, match="width 5, .* expect 256"):
        texts.encode_pooled(clip, "ball", scene.mini.anystory.model.config)


def test_nothing_is_kept_after_the_run_and_one_level_in_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a level is read, the one before it is gone."""
    kind = module("anystory_pack.anystory_core.injection.matched").ReferencePass
    made: list[Any] = []
    alive: list[int] = []
    before = kind._kept

    def kept(self: Any, *args: Any) -> Any:
        out = before(self, *args)
        if len(self.found) == 0:
            gc.collect()
            alive.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(kind, "_kept", kept)
    scene.sample(scene.apply(routing=scene.route(scene.subjects[0]), **NOISED), steps=3)
    gc.collect()
    assert len(alive) == 3 and max(alive) == 0
    assert all(ref() is None for ref in made)
