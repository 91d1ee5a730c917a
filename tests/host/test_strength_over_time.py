"""A subject's strengths that change between its start and its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scene import Scene, module


def ramped(scene: Scene, **options: Any) -> Any:
    """A routing of two subjects by masks, the first with these options."""
    given = {"strength": 1.0, "reference_strength": 1.0, "start": 0.0, "end": 1.0, **options}
    first = scene.pack.AnyStorySubjectOptions.execute(scene.subjects[0], **given).args[0]
    return scene.route(first, scene.subjects[1])


@pytest.mark.parametrize("easing", ["linear", "ease in", "ease out", "ease in and out"])
def test_one_to_one_is_bit_identical(scene: Scene, easing: str) -> None:
    given = {"strength": 0.7, "reference_strength": 0.6}
    flat = ramped(scene, **given, strength_at_start=1.0, strength_at_end=1.0, easing=easing)
    plain = scene.sample(scene.apply(routing=ramped(scene, **given)), steps=3)
    assert torch.equal(scene.sample(scene.apply(routing=flat), steps=3), plain)


def test_the_same_factor_at_both_ends_is_a_strength(scene: Scene) -> None:
    half = ramped(scene, strength_at_start=0.5, strength_at_end=0.5)
    plain = ramped(scene, strength=0.5, reference_strength=0.5)
    assert torch.equal(
        scene.sample(scene.apply(routing=half), steps=3),
        scene.sample(scene.apply(routing=plain), steps=3),
    )


def test_the_first_step_has_the_strength_at_start(scene: Scene) -> None:
    """A run of one step, and what comes after differs."""
    rising = ramped(scene, strength_at_start=0.25, strength_at_end=2.0)
    plain = ramped(scene, strength=0.25, reference_strength=0.25)
    one = [scene.sample(scene.apply(routing=r), steps=1) for r in (rising, plain)]
    # The scheduler's first noise level is the model's highest one but for rounding.
    torch.testing.assert_close(*one, rtol=1e-3, atol=1e-3)
    four = [scene.sample(scene.apply(routing=r), steps=4) for r in (rising, plain)]
    assert not torch.allclose(*four, rtol=0.01, atol=0.01)


def window(scene: Scene, **options: Any) -> Any:
    windows = module("anystory_pack.nodes.host.windows")
    chosen = module("anystory_pack.anystory_core.subject.subject").SubjectOptions(**options)
    sampling = scene.mini.model.get_model_object("model_sampling")
    return windows.Window.of(chosen, 0.0, 1.0, sampling), sampling.percent_to_sigma


@pytest.mark.parametrize(
    ("easing", "middle"),
    [("linear", 0.5), ("ease in", 0.25), ("ease out", 0.75), ("ease in and out", 0.5)],
)
def test_factors_by_the_share_of_the_window(scene: Scene, easing: str, middle: float) -> None:
    options = {"start": 0.2, "end": 0.8, "at_start": 3.0, "at_end": 1.0, "easing": easing}
    found, to_sigma = window(scene, **options)
    at = {p: found.factor(float(to_sigma(p))) for p in (0.1, 0.2, 0.5, 0.8, 0.9)}
    assert at[0.1] == at[0.9] == 0.0
    # Noise levels between two of the table's are interpolated.
    assert at[0.2] == pytest.approx(3.0, abs=1e-3) and at[0.8] == pytest.approx(1.0, abs=1e-3)
    assert at[0.5] == pytest.approx(3.0 - 2.0 * middle, abs=1e-2)


def test_a_subject_that_fades_out_leaves_the_plain_model(scene: Scene) -> None:
    """At factor 0 it is off, as at strength 0; a ramp from 0 to 0 is idle over the whole run."""
    off = [
        scene.pack.AnyStorySubjectOptions.execute(
            s, 1.0, 1.0, 0.0, 1.0, strength_at_start=0.0, strength_at_end=0.0
        ).args[0]
        for s in scene.subjects[:2]
    ]
    model = scene.apply(routing=scene.route(*off))
    assert torch.equal(scene.sample(model), scene.sample(scene.mini.model))
    found, to_sigma = window(scene, at_start=1.0, at_end=0.0)
    assert found.factor(float(to_sigma(1.0))) == 0.0
    rising, to_sigma = window(scene, at_start=0.0, at_end=1.0)
    most = scene.mini.model.get_model_object("model_sampling").sigma_max
    assert rising.factor(float(most)) == 0.0 and rising.factor(float(to_sigma(0.1))) > 0.05


def test_refused(scene: Scene) -> None:
    for name in ("strength_at_start", "strength_at_end"):
        said = name.removeprefix("strength_")
        with pytest.raises(
            scene.errors.SubjectError, match=f"AnyStorySubjectOptions: {said}: got -1"
        ):
            ramped(scene, **{name: -1.0})
    with pytest.raises(scene.errors.SubjectError, match="easing: got 'bounce', expected one of"):
        ramped(scene, easing="bounce")
