"""Which reference features act: of the whole cut-out, inside the mask, in the decoder alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.config import REFERENCES
from anystory_core.errors import CheckpointError, ConfigError
from anystory_core.injection.prepare import Settings, inside_features, prepare_subjects
from anystory_core.mini.config import CONFIG
from anystory_core.routing.sources import SingleRoute
from anystory_core.subject.encoder import PictureStates, encode_subject
from anystory_core.subject.files import load_subject, save_subject
from anystory_core.subject.preprocess import prepare_views
from anystory_core.subject.subject import Subject
from anystory_core.weights.checkpoint import read_header
from anystory_core.weights.convert.conversion import convert
from anystory_core.weights.model import AnyStoryModel, build_model

from .public_weights import run, save, small_config

GRID = CONFIG.reference.size // CONFIG.reference.latent_stride


@pytest.fixture(scope="module")
def model() -> AnyStoryModel:
    torch.manual_seed(0)
    return build_model(CONFIG, ("reference_net", "reference_projections"))


@pytest.fixture(scope="module")
def subject(model: AnyStoryModel) -> Subject:
    """Two pictures: a subject in the left half, and one of a single corner pixel."""
    masks = torch.zeros(2, 40, 40)
    masks[0, :, 4:20] = 1
    masks[1, 3:5, 30:32] = 1
    picture = torch.rand(2, 40, 40, 3, generator=torch.Generator().manual_seed(1))
    views = prepare_views(picture, masks, CONFIG)
    latents = torch.randn(2, 4, GRID, GRID, generator=torch.Generator().manual_seed(2))
    return encode_subject(model, views, PictureStates(latents=latents), label="fox")


def kept_by_hand(mask: Tensor, side: int) -> list[int]:
    """Places of a side x side grid whose square of the mask (h,w) is at least half inside; else the
    fullest."""
    step = mask.shape[0] / side
    shares: list[float] = []
    for y in range(side):
        for x in range(side):
            total = area = 0.0
            for i in range(mask.shape[0]):
                for j in range(mask.shape[1]):
                    height = max(0.0, min(i + 1, (y + 1) * step) - max(i, y * step))
                    width = max(0.0, min(j + 1, (x + 1) * step) - max(j, x * step))
                    total += float(mask[i, j]) * height * width
                    area += height * width
            shares.append(total / area)
    inside = [place for place, share in enumerate(shares) if share >= 0.5]
    best = max(shares)
    return inside or [place for place, share in enumerate(shares) if share == best]


def test_features_inside_the_masks(subject: Subject) -> None:
    """Both grids, both pictures; fewer than all, and never none."""
    assert subject.inside is not None and subject.inside.shape == (2, GRID, GRID)
    sides: set[int] = set()
    for whole, chosen in zip(subject.features, inside_features(subject), strict=True):
        side = round((whole.shape[0] / 2) ** 0.5)
        expected = [
            view * side * side + place
            for view, mask in enumerate(subject.inside)
            for place in kept_by_hand(mask, side)
        ]
        assert torch.equal(chosen, whole[expected])
        assert 2 <= len(expected) < whole.shape[0]
        sides.add(side)
    assert sides == {GRID // 2, GRID // 4}


def test_a_mask_that_fills_no_place_keeps_its_fullest(subject: Subject) -> None:
    faint = torch.zeros(2, GRID, GRID)
    faint[0, 5, 7] = 0.3
    thin = dataclasses.replace(subject, inside=faint)
    side = GRID // 4
    for whole, chosen in zip(thin.features, inside_features(thin), strict=True):
        if whole.shape[0] == 2 * side * side:
            # the second picture's mask is empty: all its places are equally full
            assert torch.equal(chosen[0], whole[(5 // 4) * side + 7 // 4])
            assert chosen.shape[0] == 1 + side * side


def test_older_subjects_keep_all(subject: Subject) -> None:
    old = dataclasses.replace(subject, inside=None)
    assert all(a is b for a, b in zip(inside_features(old), subject.features, strict=True))


FEATURES = [which for which in REFERENCES if "matched" not in which]


@pytest.mark.parametrize("given", [None, *FEATURES])
@pytest.mark.parametrize("of_file", FEATURES)
def test_what_is_projected(
    model: AnyStoryModel, subject: Subject, of_file: Any, given: Any
) -> None:
    """The file's choice, unless the settings have one; the decoder begins after the middle."""
    chosen = dataclasses.replace(model, config=dataclasses.replace(CONFIG, references=of_file))
    prepared = prepare_subjects(chosen, [subject], SingleRoute(), Settings(references=given))
    which = given or of_file
    features = subject.features if which == "whole" else inside_features(subject)
    if which == "off":
        assert all(conditions.reference[0] is None for conditions in prepared.conditions)
        assert prepared.biases == (-torch.inf, -torch.inf)
        return
    decoder = 1 + max(s.index for s in model.sites if s.part != "output")
    assert model.projections.reference is not None
    for site, conditions in zip(model.sites, prepared.conditions, strict=True):
        got = conditions.reference[0]
        if site.index == 1 or (which == "masked in the decoder" and site.index < decoder):
            assert got is None
            continue
        expected = model.projections.reference.at(site.index)(features[site.index - 2][None])
        assert got is not None and torch.equal(got.k, expected.k) and torch.equal(got.v, expected.v)


def test_sdxls_decoder_begins_at_35() -> None:
    model = build_model(AnyStoryConfig.sdxl(), (), device="meta")
    assert model.decoder_from == 35


def test_a_converted_file_says_which(tmp_path, unet, adapter) -> None:
    done, _ = run(tmp_path, unet, adapter)
    assert read_header(done.path).config.references == "off"
    done, _ = run(tmp_path, unet, adapter, references="masked in the decoder")
    assert not done.kept
    assert read_header(done.path).config.references == "masked in the decoder"
    done, _ = run(tmp_path, unet, adapter, references="whole")
    assert '"references"' not in read_header(done.path).metadata["anystory.config"]
    ip = save(tmp_path / "plus.safetensors", adapter)
    alone = convert(
        None, ip, tmp_path / "b.safetensors", config=small_config(), reference_net="none"
    )
    assert read_header(alone.path).config.references == "whole"  # there are none
    noised = "masked, matched noise"
    done = convert(
        None, ip, tmp_path / "c.safetensors", config=small_config(), reference_net="none",
        references=noised,
    )  # fmt: skip
    assert read_header(done.path).config.references == noised
    with pytest.raises(CheckpointError, match="references: got 'some', expected one of"):
        run(tmp_path, unet, adapter, references="some")
    text = CONFIG.to_json()[:-1] + ',"references":"some"}'
    with pytest.raises(ConfigError, match=r"anystory\.config\.references: got 'some'"):
        AnyStoryConfig.from_json(text)


def test_a_saved_subject_knows_its_inside(tmp_path, model: AnyStoryModel, subject: Subject) -> None:
    path = tmp_path / "fox.safetensors"
    save_subject(path, subject, overwrite=False)
    again = load_subject(path, model)
    assert again.inside is not None and torch.equal(again.inside, subject.inside)
    tensors = load_file(path)
    header = {
        "anystory.subject": "1", "label": "fox", "weights": "", "clip": "",
        "options": '{"strength": 1.0}',
    }  # fmt: skip
    old = tmp_path / "old.safetensors"
    save_file({k: v for k, v in tensors.items() if k != "inside"}, old, header)
    assert load_subject(old, model).inside is None
