"""BuildAnyStoryFlux in the host, on a file in the authors' layout of a tiny FLUX."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flux_release
import pytest
import torch
from flux_scene import CONFIG
from flux_world import FluxWorld
from scene import module

from anystory_core.bases.flux.config import FluxConfig, ReduxConfig, SiglipConfig

# What no tensor of the file tells is the release's.
TINY = dataclasses.replace(
    CONFIG, vision=SiglipConfig(width=12), redux=ReduxConfig(rank=3),
    reference=FluxConfig().reference,
)  # fmt: skip
GIVEN = {
    "anystory_flux": "anystory_flux.bin",
    "redux": "flux1-redux-dev.safetensors",
    "name": "made",
    "mixed_ranks": "ask",
}


@pytest.fixture
def folder(flux: FluxWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """models/anystory with the authors' file in it, and Redux in models/style_models."""
    build = module("anystory_pack.nodes.build_flux")  # registers the folders
    known = module("folder_paths").folder_names_and_paths
    kinds = {"anystory": {".safetensors"}, "anystory_releases": {".bin"}, "style_models": set()}
    for name in ("anystory", "style_models"):
        (tmp_path / name).mkdir()
    for name, kind in kinds.items():
        place = tmp_path / ("anystory" if name == "anystory_releases" else name)
        monkeypatch.setitem(known, name, ([str(place)], kind))
    torch.manual_seed(0)
    with torch.inference_mode(False):
        _, redux = flux_release.write(tmp_path / "anystory", TINY)
    redux.rename(tmp_path / "style_models" / redux.name)
    convert = functools.partial(build.convert_flux, head_dim=CONFIG.transformer.head_dim)
    monkeypatch.setattr(build, "convert_flux", convert)
    return tmp_path / "anystory"


def run(flux: FluxWorld, **inputs: str) -> Any:
    return flux.pack.BuildAnyStoryFlux.execute(**{**GIVEN, **inputs})


def test_it_converts_once_and_the_loader_reads_it(flux: FluxWorld, folder: Path) -> None:
    node = flux.pack.BuildAnyStoryFlux
    before = node.fingerprint_inputs(**GIVEN)
    out = run(flux)
    assert out.args == ("made.safetensors",)
    assert "reference_branches" in out.ui["text"][0] and "kept" not in out.ui["text"][0]
    assert node.fingerprint_inputs(**GIVEN) != before
    said = flux.pack.LoadAnyStory.execute("made.safetensors")
    assert "for FLUX.1-dev" in said.ui["text"][0] and "router branches" in said.ui["text"][0]
    assert said.args[0].model.routes
    made = folder / "made.safetensors"
    state = made.stat().st_ino, made.stat().st_mtime_ns
    assert "kept, it was made from the same files" in run(flux).ui["text"][0]
    assert state == (made.stat().st_ino, made.stat().st_mtime_ns)
    linked: dict[str, Any] = {**GIVEN, "name": None}  # as the host gives a link
    assert node.fingerprint_inputs(**linked) is None


def test_what_it_offers(flux: FluxWorld, folder: Path) -> None:
    """Files of torch.save in models/anystory, safetensors in models/style_models; and the authors'
    file is not offered as weights."""
    (folder.parent / "style_models" / "style.pt").write_bytes(b"")
    inputs = {i.id: i for i in flux.pack.BuildAnyStoryFlux.define_schema().inputs}
    assert inputs["anystory_flux"].options == ["anystory_flux.bin"]
    assert inputs["redux"].options == ["flux1-redux-dev.safetensors"]
    assert module("anystory_pack.nodes.host.files").weights_files() == []


def test_its_bar_ends_full(flux: FluxWorld, folder: Path) -> None:
    utils = module("comfy.utils")
    hook, seen = utils.PROGRESS_BAR_HOOK, []
    utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: seen.append(value / total)
    )
    try:
        run(flux)
    finally:
        utils.set_progress_bar_global_hook(hook)
    assert len(seen) > 10 and seen == sorted(seen) and seen[-1] == 1


@pytest.mark.parametrize("after", [1, 20, 60])
def test_a_cancelled_conversion_leaves_nothing(
    flux: FluxWorld, folder: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the sources are read for their sums, and while tensors are written."""
    management, files = module("comfy.model_management"), module("anystory_pack.nodes.host.files")
    calls: list[int] = []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == after:
            raise management.InterruptProcessingException

    monkeypatch.setattr(files.mm, "throw_exception_if_processing_interrupted", interrupted)
    before = sorted(folder.iterdir())
    with pytest.raises(management.InterruptProcessingException):
        run(flux)
    assert sorted(folder.iterdir()) == before


def test_mixed_ranks_are_asked_for(flux: FluxWorld, folder: Path) -> None:
    path = folder / "anystory_flux.bin"
    content = torch.load(path, weights_only=True)
    for name in "AB":
        key = f"transformer.x_embedder.lora_{name}.weight"
        content["ref"][key] = content["ref"][key][:2] if name == "A" else content["ref"][key][:, :2]
    torch.save(content, path)
    with pytest.raises(flux.errors.CheckpointError, match="Choose mixed_ranks .* first"):
        run(flux)
    assert run(flux, mixed_ranks="first").args == ("made.safetensors",)


def test_what_is_refused(flux: FluxWorld, folder: Path) -> None:
    def said(words: str) -> Any:
        return pytest.raises(flux.errors.AnyStoryError, match=f"BuildAnyStoryFlux: {words}")

    with said("'none.bin' is not in models/anystory"):
        run(flux, anystory_flux="none.bin")
    with said("'none' is not in models/style_models"):
        run(flux, redux="none")
    for name in ("../made", "", "a/b"):
        with said("name: got"):
            run(flux, name=name)
    (folder / "made.safetensors").write_bytes(b"somebody's")
    with said("made.safetensors: is there already"):
        run(flux)
    path = folder / "anystory_flux.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with said("anystory_flux.bin: no file of torch.save, cut off"):
        run(flux, name="other")
    assert not (folder / "other.safetensors").exists()
