"""Saved subjects and stories through the nodes."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from refused_names import REFUSED


@pytest.fixture
def folders(scene: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both places of saved subjects below a fresh folder; the host knows a second models folder,
    as extra_model_paths.yaml gives it."""
    paths = importlib.import_module("folder_paths")
    node = importlib.import_module("anystory_pack.nodes.subject_files")
    monkeypatch.setattr(paths, "output_directory", str(tmp_path / "output"))
    models = [str(tmp_path / name / "anystory") for name in ("models", "extra")]
    known = paths.folder_names_and_paths
    monkeypatch.setitem(known, "anystory", (models, {".safetensors"}))
    monkeypatch.setitem(known, node.FOLDER, ([], {".safetensors"}))
    node.register()
    paths.filename_list_cache.pop(node.FOLDER, None)
    return tmp_path


@pytest.mark.parametrize("place", ["output", "models"])
def test_a_loaded_subject_draws_the_same_picture(scene: Any, folders: Path, place: str) -> None:
    subject = scene.subjects[0]
    saved = scene.pack.SaveAnyStorySubject.execute(subject, "a ball", place)
    assert "a ball.safetensors" in saved.ui["text"][0] and saved.ui["images"]
    (file,) = folders.rglob("*.safetensors")
    wanted = {"output": "output/anystory_subjects", "models": "models/anystory/subjects"}[place]
    assert file.parent == folders / wanted
    node = scene.pack.LoadAnyStorySubject
    assert "a ball.safetensors" in node.define_schema().inputs[1].options
    loaded = node.execute(scene.mini.anystory, "a ball.safetensors", scene.mini.clip_vision).args[0]
    one, two = (
        scene.sample(scene.apply(routing=scene.route(s, scene.subjects[1])))
        for s in (subject, loaded)
    )
    assert torch.equal(one, two)
    before = node.fingerprint_inputs(subject_name="a ball.safetensors")
    scene.pack.SaveAnyStorySubject.execute(scene.subjects[1], "a ball", place, overwrite=True)
    assert node.fingerprint_inputs(subject_name="a ball.safetensors") != before
    assert node.fingerprint_inputs(subject_name=None) is None  # a link, as the host gives it


def test_subjects_in_every_models_folder_are_found(scene: Any, folders: Path) -> None:
    """The weights' own rule: what lies in a folder of extra_model_paths.yaml is listed too."""
    scene.pack.SaveAnyStorySubject.execute(scene.subjects[0], "a ball", "models")
    saved = folders / "models/anystory/subjects/a ball.safetensors"
    moved = folders / "extra/anystory/subjects/moved.safetensors"
    moved.parent.mkdir(parents=True)
    saved.rename(moved)
    node = scene.pack.LoadAnyStorySubject
    assert node.define_schema().inputs[1].options == ["moved.safetensors"]
    loaded = node.execute(scene.mini.anystory, "moved.safetensors").args[0]
    assert torch.equal(loaded.tokens, scene.subjects[0].tokens)


@pytest.mark.parametrize("place", ["output", "models"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_name_touches_nothing(scene: Any, folders: Path, name: str, place: str) -> None:
    """Neither the folder nor anything beside or above it."""
    node = importlib.import_module("anystory_pack.nodes.subject_files")
    inside = node.folders_of(place)[0]
    inside.mkdir(parents=True)
    for folder in (inside, inside.parent):
        (folder / "x.safetensors").write_bytes(b"as it was")

    def tree() -> dict[str, bytes | None]:
        return {
            str(path.relative_to(folders)): path.read_bytes() if path.is_file() else None
            for path in folders.rglob("*")
        }

    before = tree()
    with pytest.raises(scene.errors.SubjectError, match="^SaveAnyStorySubject: name: got"):
        scene.pack.SaveAnyStorySubject.execute(scene.subjects[0], name, place, overwrite=True)
    assert tree() == before


def test_errors_name_the_node(scene: Any, folders: Path) -> None:
    error = scene.errors.AnyStoryError
    with pytest.raises(error, match="SaveAnyStorySubject: name: got '../x'"):
        scene.pack.SaveAnyStorySubject.execute(scene.subjects[0], "../x")
    with pytest.raises(error, match="LoadAnyStorySubject: subject_name: 'no.safetensors' is neith"):
        scene.pack.LoadAnyStorySubject.execute(scene.mini.anystory, "no.safetensors")
    with pytest.raises(error, match="LoadAnyStorySubject: name: got '../no"):
        scene.pack.LoadAnyStorySubject.execute(scene.mini.anystory, "../no.safetensors")
    assert not list(folders.rglob("*.safetensors"))


def test_only_what_can_be_loaded_is_offered(scene: Any, folders: Path) -> None:
    """The host's list goes into folders; names here are plain."""
    node = importlib.import_module("anystory_pack.nodes.subject_files")
    scene.pack.SaveAnyStorySubject.execute(scene.subjects[0], "ball")
    inside = node.folders_of("output")[0]
    (inside / "pets").mkdir()
    shutil.copy(inside / "ball.safetensors", inside / "pets" / "fox.safetensors")
    schema = scene.pack.LoadAnyStorySubject.define_schema()
    (options,) = (i.options for i in schema.inputs if i.id == "subject_name")
    assert "ball.safetensors" in options
    assert not any("fox" in name for name in options)


def test_more_pictures_than_can_be_loaded_are_not_saved(scene: Any, folders: Path) -> None:
    one = scene.subjects[0]
    many = dataclasses.replace(one, cutout=one.cutout.expand(65, -1, -1, -1))
    with pytest.raises(scene.errors.SubjectError, match="subject: it was encoded from 65 pict"):
        scene.pack.SaveAnyStorySubject.execute(many, "many")
    assert not list(folders.rglob("*.safetensors"))


def test_subjects_are_not_offered_as_weights(scene: Any) -> None:
    paths = importlib.import_module("folder_paths")
    load = importlib.import_module("anystory_pack.nodes.load")
    folder = Path(paths.folder_names_and_paths["anystory"][0][0])
    for name in ("weights.safetensors", "subjects/fox.safetensors", "mine/more.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    try:
        paths.filename_list_cache.pop("anystory", None)
        listed = {Path(name).as_posix() for name in load.weights_files()}
        assert {"weights.safetensors", "mine/more.safetensors"} <= listed
        assert "subjects/fox.safetensors" not in listed
    finally:
        for name in ("weights.safetensors", "subjects/fox.safetensors", "mine/more.safetensors"):
            (folder / name).unlink()
        paths.filename_list_cache.pop("anystory", None)


SCRIPT = """
Style: bright
Role Ball: a red ball
Role Box: a blue box
Panel: Ball on a beach.
Panel: Ball and Box.
Panel: nobody.
"""


def test_panels(scene: Any) -> None:
    prompts, routings, seeds = scene.pack.AnyStoryPanels.execute(scene.route(), SCRIPT, 5).args
    assert prompts == [
        "a red ball on a beach, bright", "a red ball and a blue box, bright", "nobody, bright",
    ]  # fmt: skip
    assert seeds == [5, 6, 7]
    labels = [[s.label for s in routing.subjects] for routing in routings]
    assert labels == [["ball"], ["ball", "box"], []]
    schema = scene.pack.AnyStoryPanels.define_schema()
    assert all(output.is_output_list for output in schema.outputs)
    plain = scene.sample(scene.mini.model)
    assert torch.equal(plain, scene.sample(scene.apply(routing=routings[2])))
    both = scene.sample(scene.apply())
    assert torch.equal(both, scene.sample(scene.apply(routing=routings[1])))


def test_masks_and_labels_follow_their_subject(scene: Any) -> None:
    left, right = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    routing = scene.route(mode="masks", masks=[left, right])
    script = "Role Ball: x\nRole Box: y\nPanel: Box"
    (panel,) = scene.pack.AnyStoryPanels.execute(routing, script, 0).args[1]
    assert torch.equal(panel.masks[0], right[0]) and panel.mode == "masks"


def test_a_story_with_other_roles(scene: Any) -> None:
    with pytest.raises(
        scene.errors.AnyStoryError,
        match=r"AnyStoryPanels: routing: it has 2 subjects \(ball, box\), the script has 1 roles",
    ):
        scene.pack.AnyStoryPanels.execute(scene.route(), "Role A: x\nPanel: A", 0)
    with pytest.raises(scene.errors.AnyStoryError, match="AnyStoryPanels: line 1: got 'hello'"):
        scene.pack.AnyStoryPanels.execute(scene.route(), "hello", 0)
