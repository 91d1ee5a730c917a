"""Saved subjects: round trip, names that are refused, damaged files."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from anystory_core.errors import AnyStoryError, ModelMismatchError, SubjectError
from anystory_core.file_names import check_name
from anystory_core.subject.encoder import encode_subject
from anystory_core.subject.files import (
    check_clip,
    load_subject,
    save_subject,
    subject_path,
    thumbnail,
)
from anystory_core.subject.subject import Subject, SubjectOptions
from anystory_core.tensor_files import save_tensors
from anystory_core.weights.model import AnyStoryModel

from .encoded import CONFIG, small_model, small_states, small_views
from .refused_names import REFUSED


@pytest.fixture(scope="module")
def model() -> AnyStoryModel:
    return small_model(CONFIG)


@pytest.fixture(scope="module")
def subject(model: AnyStoryModel) -> Subject:
    made = encode_subject(model, small_views(CONFIG), small_states(CONFIG), label="red fox ☆")
    return made.with_options(SubjectOptions(strength=0.5, end=0.75))


def test_round_trip(model: AnyStoryModel, subject: Subject, tmp_path: Path) -> None:
    path = subject_path(tmp_path, "red fox")
    save_subject(path, subject, overwrite=False)
    loaded = load_subject(path, model)
    for field in dataclasses.fields(Subject):
        one, two = getattr(subject, field.name), getattr(loaded, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two), field.name
        elif field.name == "features":
            assert len(one) == len(two) and all(map(torch.equal, one, two))
        else:
            assert one == two, field.name
    with safe_open(path, "pt") as file:
        head, data = file.metadata()["modelspec.thumbnail"].split(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (96, 96)


def test_what_the_label_says_is_kept(model: AnyStoryModel, tmp_path: Path) -> None:
    """References at the noise of the step are read with it."""
    make = torch.Generator().manual_seed(2)
    label = torch.randn(1, 3, CONFIG.unet.context_dim, generator=make)
    pooled = torch.randn(CONFIG.unet.pooled_dim, generator=make)
    states = dataclasses.replace(small_states(CONFIG), label=label, pooled=pooled)
    subject = encode_subject(model, small_views(CONFIG), states, label="fox")
    path = subject_path(tmp_path, "fox")
    save_subject(path, subject, overwrite=False)
    loaded = load_subject(path, model)
    assert loaded.text is not None and torch.equal(loaded.text, label[0])
    assert loaded.pooled is not None and torch.equal(loaded.pooled, pooled)
    for part in ("text", "pooled"):
        wide = dataclasses.replace(subject, **{part: torch.zeros(3, 99)})
        save_subject(path, wide, overwrite=True)
        with pytest.raises(SubjectError, match=part):
            load_subject(path, model)


def test_nothing_is_replaced_unless_asked(
    model: AnyStoryModel, subject: Subject, tmp_path: Path
) -> None:
    path = subject_path(tmp_path, "fox")
    assert save_subject(path, subject, overwrite=False)
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    # A host runs a node again whenever its result is no longer kept.
    assert not save_subject(path, subject, overwrite=False)
    assert not save_subject(path, subject, overwrite=True)
    assert path.stat().st_mtime_ns == written
    other = dataclasses.replace(subject, label="other")
    moved = dataclasses.replace(subject, tokens=subject.tokens + 1)
    for changed in (other, moved):
        with pytest.raises(SubjectError, match="'fox' is already there, and another subject"):
            save_subject(path, changed, overwrite=False)
        assert path.read_bytes() == before
    assert save_subject(path, other, overwrite=True)
    assert load_subject(path, model).label == "other"
    path.write_bytes(b"cut off")
    with pytest.raises(SubjectError, match="is already there"):
        save_subject(path, subject, overwrite=False)
    assert save_subject(path, other, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["fox.safetensors"]


def test_other_weights_are_named(model: AnyStoryModel, subject: Subject, tmp_path: Path) -> None:
    path = subject_path(tmp_path, "fox")
    save_subject(path, dataclasses.replace(subject, fingerprint="weights-b"), overwrite=False)
    with pytest.raises(ModelMismatchError, match="weights-b, loaded are weights-a"):
        load_subject(path, model)
    check_clip(subject, "fox", "clip-a")
    with pytest.raises(ModelMismatchError, match="clip-a, connected are clip-b"):
        check_clip(subject, "fox", "clip-b")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(SubjectError, match="^name: got"):
        subject_path(tmp_path, name)


@pytest.mark.parametrize("name", ["red fox", "狐狸", "a-b_c.1", "fox.safetensors", "console"])
def test_good_names(name: str, tmp_path: Path) -> None:
    assert subject_path(tmp_path, name).parent == tmp_path
    assert check_name(name) == name.removesuffix(".safetensors")


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "fox.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SubjectError, match="is a link"):
        subject_path(tmp_path, "fox")


def test_an_unwritable_place(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SubjectError, match=r"fox\.safetensors cannot be written"):
        save_subject(subject_path(tmp_path / "file", "fox"), subject, overwrite=False)


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1" + "0" * 5000, "1e400", "NaN", "-1", "[]"])
@pytest.mark.parametrize("key", ["strength", "start"])
def test_options_that_are_no_numbers(
    model: AnyStoryModel, subject: Subject, tmp_path: Path, key: str, value: str
) -> None:
    path = subject_path(tmp_path, "fox")
    save_subject(path, subject, overwrite=False)
    with safe_open(path, "pt") as file:
        header = file.metadata() | {"options": f'{{"{key}": {value}}}'}
    save_tensors(path, load_file(path), header)
    with pytest.raises(SubjectError, match=r"^fox\.safetensors: its options are damaged"):
        load_subject(path, model)


def test_mutated_files(model: AnyStoryModel, subject: Subject, tmp_path: Path) -> None:
    """200 files with damaged bytes, mostly in the header: read as they were, or refused with
    words; nothing else in the folder appears or changes."""
    path = subject_path(tmp_path, "fox")
    save_subject(path, subject, overwrite=False)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    refused = 0
    for number in range(200):
        data = bytearray(whole)
        if number % 5 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.choice((1, 2, 8))):
            if data:
                place = rng.randrange(min(header if rng.random() < 0.8 else len(data), len(data)))
                data[place] = rng.randrange(256)
        path.write_bytes(data)
        try:
            loaded = load_subject(path, model)
        except AnyStoryError as error:
            refused += 1
            assert "fox.safetensors" in str(error) and len(str(error)) < 600
        else:
            assert loaded.tokens is not None and loaded.tokens.shape == subject.tokens.shape
    assert refused > 100
    assert [p.name for p in tmp_path.iterdir()] == ["fox.safetensors"]


WIDE = "(2, 64, 64, 3)"
# What is changed of a good file -> what its reader says. None: the entry is taken away.
DAMAGED: dict[str, tuple[dict[str, str | None], dict[str, Any], str]] = {
    "another kind of file": (
        {"anystory.subject": None}, {},
        "not a saved subject; expected a file made by Save AnyStory Subject",
    ),
    "a later format": (
        {"anystory.subject": "2" * 30}, {},
        f"subject format {'2' * 20!r}, this version reads '1'; update the node pack or save the "
        "subject again",
    ),
    "header": (
        {"clip": None, "label": None}, {},
        "its header lacks ['label', 'clip']; save the subject again",
    ),
    "label": ({"label": "two  spaces"}, {}, "its label is damaged; save the subject again"),
    "options": ({"options": "[1]"}, {}, "its options are damaged; save the subject again"),
    "no weights": (
        {"weights": ""}, {},
        "encoded by AnyStory weights unsaved, loaded are weights-a; load those weights, or encode "
        "the subject again",
    ),
    "no cutout": ({}, {"cutout": None}, "tensor cutout is missing; save the subject again"),
    "cutout of floats": (
        {}, {"cutout": torch.zeros(2, 64, 64, 3)},
        "cutout holds 2 torch.float32 pictures, expected 1 to 64 of torch.uint8; save the subject "
        "again",
    ),
    "no pictures": (
        {}, {"cutout": torch.zeros(0, 64, 64, 3, dtype=torch.uint8)},
        "cutout holds 0 torch.uint8 pictures, expected 1 to 64 of torch.uint8; save the subject "
        "again",
    ),
    "a number": (
        {}, {"cutout": torch.zeros((), dtype=torch.uint8)},
        "cutout holds 0 torch.uint8 pictures, expected 1 to 64 of torch.uint8; save the subject "
        "again",
    ),
    "too many pictures": (
        {}, {"cutout": torch.zeros(65, 1, 1, 3, dtype=torch.uint8)},
        "cutout holds 65 torch.uint8 pictures, expected 1 to 64 of torch.uint8; save the subject "
        "again",
    ),
    "another size": (
        {}, {"cutout": torch.zeros(2, 64, 32, 3, dtype=torch.uint8)},
        f"cutout has shape (2, 64, 32, 3), expected {WIDE}",
    ),
    "missing": (
        {}, {"tokens": None},
        "tensors ['tokens'] missing and [] unknown; save the subject again",
    ),
    "unknown": (
        {}, {"a": torch.zeros(1), "z": torch.zeros(1), "y": torch.zeros(1), "b": torch.zeros(1)},
        "tensors [] missing and ['a', 'b', 'y'] unknown; save the subject again",
    ),
    "shape": (
        {}, {"routing": torch.zeros(9)},
        "tensor routing is torch.float32 (9,), expected floats of shape (8,); save the subject "
        "again",
    ),
    "whole numbers": (
        {}, {"routing": torch.zeros(8, dtype=torch.int64)},
        "tensor routing is torch.int64 (8,), expected floats of shape (8,); save the subject again",
    ),
    "NaN": (
        {}, {"routing": torch.full((8,), float("nan"))},
        "tensor routing has NaN or infinite values; save it again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_said(
    model: AnyStoryModel, subject: Subject, tmp_path: Path, name: str
) -> None:
    header, tensors, said = DAMAGED[name]
    path = subject_path(tmp_path, "fox")
    save_subject(path, subject, overwrite=False)
    with safe_open(path, "pt") as file:
        known = {**file.metadata(), **header}
    changed = {**load_file(path), **tensors}
    save_tensors(
        path,
        {name: x for name, x in changed.items() if x is not None},
        {key: value for key, value in known.items() if value is not None},
    )
    with pytest.raises(AnyStoryError) as caught:
        load_subject(path, model)
    assert str(caught.value) == f"fox.safetensors: {said}"


def test_of_one_picture_and_of_the_most(
    model: AnyStoryModel, subject: Subject, tmp_path: Path
) -> None:
    for count in (1, 64):
        many = encode_subject(
            model, small_views(CONFIG, count), small_states(CONFIG, count), label="x"
        )
        path = subject_path(tmp_path, f"of {count}")
        assert save_subject(path, many, overwrite=False)
        assert load_subject(path, model).views == count
    more = dataclasses.replace(subject, cutout=subject.cutout[:1].expand(65, -1, -1, -1))
    with pytest.raises(SubjectError) as caught:
        save_subject(subject_path(tmp_path, "more"), more, overwrite=False)
    assert str(caught.value) == (
        "subject: it was encoded from 65 pictures, at most 64 can be saved; encode fewer of them"
    )


def test_the_thumbnail_is_of_the_first_picture(subject: Subject) -> None:
    first, second = subject.cutout
    assert not torch.equal(first, second)
    data = base64.b64decode(thumbnail(first).split(",")[1])
    with Image.open(io.BytesIO(data)) as picture:
        small = torch.tensor(list(picture.convert("RGB").tobytes())).reshape(96, 96, 3)
    plain = Image.fromarray(first.numpy()).resize((96, 96), Image.Resampling.LANCZOS)
    wanted = torch.tensor(list(plain.tobytes())).reshape(96, 96, 3)
    # JPEG at quality 85 over noise: a few steps of 255 on the mean.
    assert float((small - wanted).abs().float().mean()) < 20


def test_thumbnails_in_files_are_of_the_first_picture(
    model: AnyStoryModel, subject: Subject, tmp_path: Path
) -> None:
    path = subject_path(tmp_path, "fox")
    save_subject(path, subject, overwrite=False)
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.thumbnail"] == thumbnail(subject.cutout[0])
