"""The nodes with a FLUX model: whole sampling runs against the naive transcription, and rules."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import flux_naive
import flux_scene
import pytest
import torch
from flux_world import FluxWorld
from torch import Tensor


@pytest.fixture(scope="module")
def world(flux: FluxWorld) -> FluxWorld:
    return flux


@pytest.fixture(scope="module")
def naive(world: FluxWorld) -> flux_naive.Flux:
    return flux_scene.naive_of(world.model.model.diffusion_model, world.anystory.model)


def close(a: Tensor, b: Tensor, limit: float = 1e-4) -> bool:
    return float((a - b).norm() / b.norm()) < limit


def start(world: FluxWorld, batch: int = 1, seed: int = 0) -> Tensor:
    """The noise of KSampler."""
    import comfy.sample

    return comfy.sample.prepare_noise(world.latent(batch=batch)["samples"], seed)


def by_hand(
    world: FluxWorld, naive: flux_naive.Flux, subjects: list[Any], *, mode: str = "learned",
    masks: Any = None, steps: int = 6, concept: tuple[float, float] = (0.1, 0.3),
    first: float | None = None, scale: float = 0.6, gamma: float = 0.0, prompt: Any = None,
    row: int = 0, batch: int = 1, factor: Any = None,
) -> Tensor:  # fmt: skip
    """Euler's steps with the naive transcription and the authors' rule for windows. factor: of both
    strengths at a step."""
    import comfy.samplers

    prompt = prompt or world.positive
    sampling = world.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    x = start(world, batch)[row].double()
    height, width = x.shape[1:]
    grid = -(-height // 2), -(-width // 2)
    if first is None:
        first = 0.09 if len(subjects) > 1 else 0.0
    regions = None
    if masks is not None:
        area = torch.nn.functional.interpolate
        weights = torch.stack([area(m[None], grid, mode="area")[0, 0].flatten() for m in masks])
        both = torch.cat((weights, 1 - weights.amax(0, keepdim=True)))
        regions = both.argmax(0)
    states, extra = prompt[0]
    for i in range(steps):
        told = int(steps * concept[0] + 0.5) <= i < int(steps * concept[1] + 0.5)
        seen = int(steps * first + 0.5) <= i
        now = 1.0 if factor is None else factor(i / steps)
        people = [
            flux_naive.Person(
                scale * now * s.concept if told else None,
                s.routing,
                flux_scene.packed(s.latents) if seen else None,
                s.keep,
                gamma + math.log(now),
            )
            for s in subjects
        ]
        acts = told or seen
        result = naive.forward(
            flux_scene.tokens_of(x),
            grid,
            float(sigmas[i]),
            states[0],
            extra["pooled_output"][0],
            extra["guidance"],
            people if acts else [],
            router=acts and mode == "learned" and len(subjects) > 1,
            regions=regions if acts else None,
        )
        x = x + (sigmas[i + 1] - sigmas[i]).double() * flux_scene.latent_of(
            result.tokens, height, width
        )
    format_ = world.model.model.latent_format
    return (x / format_.scale_factor + format_.shift_factor).float()


@pytest.mark.parametrize("least", [1, 10**9], ids=["by region", "masked"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_run_is_the_transcription_of_the_release(
    world: FluxWorld, naive: flux_naive.Flux, count: int, least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(world.module("bases.flux.call"), "LEAST_SORTED", least)
    subjects = world.subjects[:count]
    out = world.sample(world.apply(world.route(*subjects)))
    assert close(out[0], by_hand(world, naive, subjects))
    assert not close(out, world.sample(), 1e-2)


def test_masks_decide(world: FluxWorld, naive: flux_naive.Flux) -> None:
    masks = world.halves()
    routing = world.route(mode="masks", masks=masks)
    out = world.sample(world.apply(routing))
    assert close(out[0], by_hand(world, naive, world.subjects, mode="masks", masks=masks))
    assert not close(out, world.sample(world.apply()), 1e-3)


@pytest.mark.parametrize("least", [1, 10**9], ids=["by region", "masked"])
@pytest.mark.parametrize("count", [1, 2])
def test_empty_places_go_through_the_layers_once(
    world: FluxWorld, naive: flux_naive.Flux, count: int, least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three of four places of each subject lie outside of its mask; the transcription has them
    all."""
    monkeypatch.setattr(world.module("bases.flux.call"), "LEAST_SORTED", least)
    where = importlib.import_module(f"{world.pack.__name__}.host.flux.passes")
    lengths: list[tuple[int, ...]] = []
    layout = where.Layout

    def seen(text: int, concepts: tuple[int, ...], *rest: Any) -> Any:
        lengths.append(concepts)
        return layout(text, concepts, *rest)

    monkeypatch.setattr(where, "Layout", seen)
    subjects = [
        dataclasses.replace(s, concept=s.concept * torch.tensor([[0.0], [1.0], [0.0], [0.0]]))
        for s in world.subjects[:count]
    ]
    out = world.sample(world.apply(world.route(*subjects), concept_end=1.0, reference_start=0.0))
    assert set(lengths) == {(2,) * count, (0,) * count}
    expected = by_hand(world, naive, subjects, concept=(0.1, 1.0), first=0.0)
    assert close(out[0], expected)


def test_settings(world: FluxWorld, naive: flux_naive.Flux) -> None:
    model = world.apply(
        strength=1.5,
        reference_strength=0.5,
        concept_start=0.0,
        concept_end=0.8,
        reference_start=0.4,
    )
    expected = by_hand(
        world, naive, world.subjects, concept=(0.0, 0.8), first=0.4, scale=0.9,
        gamma=math.log(0.5),
    )  # fmt: skip
    assert close(world.sample(model)[0], expected)


def test_strengths_that_change(world: FluxWorld, naive: flux_naive.Flux, pack: ModuleType) -> None:
    given = {"strength": 1.0, "reference_strength": 1.0, "start": 0.0, "end": 1.0}
    ramp = {"strength_at_start": 0.3, "strength_at_end": 2.0, "easing": "ease in"}
    subjects = [
        pack.AnyStorySubjectOptions.execute(s, **given, **ramp).args[0] for s in world.subjects
    ]
    out = world.sample(world.apply(world.route(*subjects), concept_end=0.8), steps=8)
    expected = by_hand(
        world, naive, world.subjects, steps=8, concept=(0.1, 0.8),
        factor=lambda t: 0.3 + 1.7 * t * t,
    )  # fmt: skip
    assert close(out[0], expected, 1e-3)  # the host's table of noise levels has 10,000 entries
    constant = by_hand(world, naive, world.subjects, steps=8, concept=(0.1, 0.8))
    assert not close(out[0], constant, 1e-2)
    gone = {**given, "strength_at_start": 0.0, "strength_at_end": 0.0}
    nobody = [pack.AnyStorySubjectOptions.execute(s, **gone).args[0] for s in world.subjects]
    assert torch.equal(world.sample(world.apply(world.route(*nobody))), world.sample())


def test_each_picture_of_a_batch_has_its_masks(world: FluxWorld, naive: flux_naive.Flux) -> None:
    left, right = world.halves()
    masks = [torch.cat((left, right)), torch.cat((right, left))]
    model = world.apply(world.route(mode="masks", masks=masks))
    out = world.sample(model, latent_image=world.latent(batch=2), steps=3)
    for row in range(2):
        own = [mask[row : row + 1] for mask in masks]
        expected = by_hand(
            world, naive, world.subjects, mode="masks", masks=own, steps=3, row=row, batch=2
        )
        assert close(out[row], expected)
    with pytest.raises(world.errors.RoutingError, match="has 2 masks, the batch has 3 pictures"):
        world.sample(model, latent_image=world.latent(batch=3), steps=3)
    with pytest.raises(world.errors.RoutingError, match="one subject has 2 masks and another 3"):
        world.route(mode="masks", masks=[masks[0], torch.cat((left, right, left))])


def test_a_mask_that_gives_no_place_is_said(world: FluxWorld, pack: ModuleType) -> None:
    left, _ = world.halves()
    inputs = {"subject_1": world.subjects[0], "mask_1": left}
    inputs |= {"subject_2": world.subjects[1], "mask_2": left}
    said = pack.SubjectRouter.execute(anystory=world.anystory, mode="masks", **inputs).ui["text"]
    assert len(said) == 1 and "Subject 2 ('box') gets no place" in said[0]


def test_rows_of_a_batch_route_for_themselves(world: FluxWorld, naive: flux_naive.Flux) -> None:
    out = world.sample(world.apply(), latent_image=world.latent(batch=2), steps=3)
    for row in range(2):
        expected = by_hand(world, naive, world.subjects, steps=3, row=row, batch=2)
        assert close(out[row], expected)


def test_unconditional_rows_are_plain(world: FluxWorld) -> None:
    """With cfg: cond + (cond - uncond) (cfg - 1), both from runs of one row each."""
    together = world.sample(world.apply(), cfg=3.0, steps=1)
    cond, plain = world.sample(world.apply(), steps=1), world.sample(steps=1)
    uncond = world.sample(positive=world.prompt(2), steps=1)
    assert not torch.equal(cond, plain)
    assert close(together, uncond + 3.0 * (cond - uncond), 1e-4)
    kept = world.sample(world.apply(references_in_uncond=True), cfg=3.0, steps=1)
    other = world.sample(world.apply(), positive=world.prompt(2), steps=1)
    assert close(kept, other + 3.0 * (cond - other), 1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": 0.0, "reference_strength": 0.0},
        {"start": 0.5, "end": 0.5},
    ],
)
def test_nothing_active_is_the_plain_model(world: FluxWorld, settings: dict[str, Any]) -> None:
    assert torch.equal(world.sample(world.apply(**settings)), world.sample())


def test_references_off(world: FluxWorld) -> None:
    off, none = world.apply(references="off"), world.apply(reference_strength=0.0)
    assert torch.equal(world.sample(off), world.sample(none))
    assert not close(world.sample(off), world.sample(world.apply()), 1e-2)


def test_no_subject_is_the_plain_model(world: FluxWorld, pack: ModuleType) -> None:
    routing = pack.SubjectRouter.execute(anystory=world.anystory, mode="learned").args[0]
    assert torch.equal(world.sample(world.apply(routing)), world.sample())


def test_steps_outside_the_windows_are_the_plain_model(world: FluxWorld) -> None:
    late = world.apply(start=0.5, end=1.0)
    sigma: list[Tensor] = []
    plain: list[Tensor] = []
    for model, found in ((late, sigma), (world.model, plain)):
        import comfy.sample

        comfy.sample.sample(
            model, start(world), 6, 1.0, "euler", "simple", world.positive, world.positive,
            world.latent()["samples"], callback=lambda i, x0, x, n, found=found: found.append(x0),
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(sigma[:3], plain[:3], strict=True))
    assert not torch.equal(sigma[3], plain[3])


def test_apply_twice_from_one_model_and_nothing_stays(world: FluxWorld) -> None:
    plain = world.sample()
    first, second = world.apply(), world.apply()
    out = world.sample(first)
    assert torch.equal(out, world.sample(second)) and torch.equal(out, world.sample(first))
    assert torch.equal(plain, world.sample())
    assert not world.model.model_options["transformer_options"].get("patches_replace")
    with pytest.raises(world.errors.RoutingError, match="already went through"):
        world.apply(model=first)


def test_a_cancel_leaves_nothing(world: FluxWorld) -> None:
    import comfy.model_management as mm
    import comfy.sample

    model = world.apply()
    before = world.sample(model)

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise mm.InterruptProcessingException()

    with pytest.raises(mm.InterruptProcessingException):
        comfy.sample.sample(
            model, start(world), 6, 1.0, "euler", "simple", world.positive, world.positive,
            world.latent()["samples"], callback=stop,
        )  # fmt: skip
    assert "anystory_run" not in model.model_options["transformer_options"]
    assert torch.equal(before, world.sample(model))


def test_two_prompts_have_references_of_their_own(world: FluxWorld) -> None:
    """Two conds with areas in one run: each sees references under its own pooled text."""
    import node_helpers

    left = node_helpers.conditioning_set_values(world.prompt(1), {"area": (8, 4, 0, 0)})
    right = node_helpers.conditioning_set_values(world.prompt(5), {"area": (8, 6, 0, 4)})
    passes: list[int] = []
    glue = world.module("bases.flux.reference")
    where = importlib.import_module(f"{world.pack.__name__}.host.flux.passes")
    whole = glue.reference_pass
    with pytest.MonkeyPatch.context() as patch:

        def counted(*args: Any, **kw: Any) -> Any:
            passes.append(1)
            return whole(*args, **kw)

        patch.setattr(where, "reference_pass", counted)
        world.sample(world.apply(), positive=[*left, *right])
        assert len(passes) == 2
        passes.clear()
        world.sample(world.apply(), latent_image=world.latent(batch=2))
        assert len(passes) == 1


def test_routes_are_recorded(world: FluxWorld, pack: ModuleType) -> None:
    model, maps = world.apply_with_maps()
    latent = world.sample(model)
    record = maps.find(latent).record
    assert record.blocks == tuple(range(1, flux_scene.BLOCKS + 1)) and record.rows == 1
    assert [site.label for site in record.sites][:3] == ["double 0", "double 1", "single 0"]
    assert [level.step for level in record.levels] == list(range(6))
    assert [level.shows(0) for level in record.levels] == [False, *[True] * 5]
    assert record.shares(0)[-1] == 0  # no background
    single, maps = world.apply_with_maps(world.route(world.subjects[0]))
    assert maps.find(world.sample(single)).record.shares(0) == (1.0, 0.0)


def test_save_and_load(world: FluxWorld, tmp_path: Path) -> None:
    files = world.module("subject.files")
    flux = world.module("subject.flux")
    path = tmp_path / "ball.safetensors"
    assert files.save_subject(path, world.subjects[0], overwrite=False)
    back = flux.load_flux_subject(path, world.anystory.model)
    for name, tensor in world.subjects[0].tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name
    assert back.label == "ball" and torch.equal(back.cutout, world.subjects[0].cutout)
    with pytest.raises(world.errors.ModelMismatchError, match="encoded for flux"):
        files.load_subject(path, world.mini.anystory.model)
