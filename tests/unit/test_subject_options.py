"""Options of a subject: their ranges and what is said of others; a subject keeps its tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from anystory_core.errors import ModelMismatchError, SubjectError
from anystory_core.subject.encoder import encode_subject
from anystory_core.subject.flux import FluxSubject
from anystory_core.subject.subject import Subject, SubjectOptions, subjects_of

from .encoded import CONFIG, small_model, small_states, small_views


def test_the_ends_of_the_ranges_are_taken() -> None:
    whole = SubjectOptions(strength=0.0, reference_strength=0.0, start=0.0, end=1.0)
    assert (whole.strength, whole.end) == (0.0, 1.0)
    assert SubjectOptions(strength=1e308, reference_strength=5).reference_strength == 5
    for point in (0.0, 0.5, 1.0):
        assert SubjectOptions(start=point, end=point).start == point


@pytest.mark.parametrize("name", ["strength", "reference_strength"])
@pytest.mark.parametrize("value", [-0.01, float("inf"), float("nan"), 10**400])
def test_strengths(name: str, value: float) -> None:
    with pytest.raises(SubjectError) as caught:
        SubjectOptions(**{name: value})
    assert str(caught.value) == f"{name}: got {value}, expected a number of 0 or more"


@pytest.mark.parametrize("name", ["start", "end"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_fractions(name: str, value: float) -> None:
    with pytest.raises(SubjectError) as caught:
        SubjectOptions(**{name: value})
    assert str(caught.value) == f"{name}: got {value}, expected a fraction from 0 to 1"


def test_an_end_before_the_start() -> None:
    with pytest.raises(SubjectError) as caught:
        SubjectOptions(start=0.6, end=0.5)
    assert str(caught.value) == "start: got 0.6, after end = 0.5; expected start <= end"


def test_other_options_and_the_same_tensors() -> None:
    subject = encode_subject(
        small_model(CONFIG), small_views(CONFIG), small_states(CONFIG), label="x"
    )
    assert subject.options == SubjectOptions()
    weak = subject.with_options(SubjectOptions(strength=0.25))
    assert weak.options.strength == 0.25 and subject.options.strength == 1.0
    assert weak.tokens is subject.tokens and weak.features is subject.features


def test_a_function_on_every_tensor_that_the_unet_uses() -> None:
    subject = encode_subject(
        small_model(CONFIG), small_views(CONFIG), small_states(CONFIG), label="x"
    )
    optional = ("states", "phrase", "latents", "text", "pooled")
    subject = dataclasses.replace(subject, **{name: torch.ones(2) for name in optional})
    twice = subject.map(lambda x: 2 * x)
    for name in ("tokens", "routing", "background_tokens", "background_routing", *optional):
        assert getattr(twice, name).equal(2 * getattr(subject, name)), name
    pairs = zip(twice.features, subject.features, strict=True)
    assert all(a.equal(2 * b) for a, b in pairs)
    assert twice.cutout is subject.cutout
    none = subject.with_options(SubjectOptions())
    assert none.map(lambda x: x).tokens is subject.tokens


def test_subjects_of_other_weights_are_named() -> None:
    subject = encode_subject(
        small_model(CONFIG), small_views(CONFIG), small_states(CONFIG), label="fox"
    )
    assert subjects_of(Subject, [subject], "weights-a") == [subject]
    unsaved = dataclasses.replace(subject, fingerprint="")
    for given, fingerprint, words in (
        (subject, "weights-b", r"'fox' .* \(weights-a\) than those in use \(weights-b\); encode"),
        (subject, "", r"\(weights-a\) than those in use \(unsaved\)"),
        (unsaved, "weights-b", r"\(unsaved\) than those in use \(weights-b\)"),
    ):
        with pytest.raises(ModelMismatchError, match=words):
            subjects_of(Subject, [given], fingerprint)
    with pytest.raises(ModelMismatchError, match="'fox' was encoded for sdxl, .* are for flux"):
        subjects_of(FluxSubject, [subject], "weights-a")
