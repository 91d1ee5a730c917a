"""BuildAnyStory in the host, on public weights of a small model."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from public_weights import (
    adapter_state,
    diffusers_unet,
    ldm_state,
    save,
    save_pickle,
    small_config,
    with_gates,
)
from scene import Scene, module

GIVEN = {
    "checkpoint": "base.safetensors",
    "ip_adapter": "plus.safetensors",
    "name": "made",
    "reference_net": "simplified",
    "precision": "fp16",
}


@pytest.fixture
def folders(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The host's folders of sources and results, empty, by name."""
    module("anystory_pack.nodes.build")  # registers the folders
    known = module("folder_paths").folder_names_and_paths
    found = {name: tmp_path / name for name in ("checkpoints", "ipadapter", "anystory")}
    for name, folder in found.items():
        folder.mkdir()
        monkeypatch.setitem(known, name, ([str(folder)], {".safetensors", ".bin"}))
    return found


@pytest.fixture
def small(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The folders with both sources in them, of sizes that the node takes for SDXL's."""
    config = small_config()
    names = list(diffusers_unet(config).attn_processors)
    save(folders["checkpoints"] / "base.safetensors", ldm_state(config))
    save(folders["ipadapter"] / "plus.safetensors", adapter_state(names, config))
    build = module("anystory_pack.nodes.build")
    own = module("anystory_pack.anystory_core.bases.sdxl.config").AnyStoryConfig.from_json(
        config.to_json()
    )
    monkeypatch.setattr(build, "convert", functools.partial(build.convert, config=own))
    return folders


class Queue:
    """The host's cache around the node: it runs when its inputs or its fingerprint have changed."""

    def __init__(self, scene: Scene) -> None:
        self.node = scene.pack.BuildAnyStory
        self.seen: Any = None

    def run(self, **inputs: str) -> str | None:
        """What the node shows; None when it did not run."""
        given = {**GIVEN, **inputs}
        key = (given, self.node.fingerprint_inputs(**given))
        if key == self.seen:
            return None
        out = self.node.execute(**given)
        assert out.args == ("made.safetensors",)
        self.seen = key
        return "\n".join(out.ui["text"])


def test_it_converts_once(scene: Scene, small: dict[str, Path]) -> None:
    queue, made = Queue(scene), small["anystory"] / "made.safetensors"
    linked: dict[str, Any] = {**GIVEN, "name": None}  # as the host gives a link
    assert queue.node.fingerprint_inputs(**linked) is None
    first = queue.run()
    assert first is not None and "reference_net" in first and "kept" not in first
    loaded = scene.pack.LoadAnyStory.execute("made.safetensors").args[0]
    assert loaded.model.reference_net is not None and loaded.model.routers is None

    def state() -> tuple[int, int]:  # another file has another number
        return made.stat().st_ino, made.stat().st_mtime_ns

    before = state()
    for inputs in ({}, {}, {"name": "made.safetensors"}):
        shown = queue.run(**inputs)
        assert shown is None or "kept, it was made from the same files" in shown
        assert state() == before
    assert queue.run(name="made.safetensors") is None


@pytest.mark.parametrize("source", ["checkpoints/base", "ipadapter/plus"])
def test_it_converts_again_when_a_source_has_changed(
    scene: Scene, small: dict[str, Path], source: str
) -> None:
    queue, made = Queue(scene), small["anystory"] / "made.safetensors"
    queue.run()
    before = made.read_bytes()
    path = small["anystory"].parent / f"{source}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last bit of a number
    path.write_bytes(data)
    shown = queue.run()
    assert shown is not None and "kept" not in shown
    assert made.read_bytes() != before


def test_it_converts_again_when_a_setting_has_changed_or_the_file_is_gone(
    scene: Scene, small: dict[str, Path]
) -> None:
    queue, made = Queue(scene), small["anystory"] / "made.safetensors"
    for inputs in (
        {},
        {"precision": "bf16"},
        {"reference_net": "none"},
        {"references": "masked in the decoder"},
        {},
    ):
        shown = queue.run(**inputs)
        assert shown is not None and "kept" not in shown, inputs
    queue.run()
    made.unlink()
    assert queue.run() is not None and made.is_file()


def test_its_bar_ends_full(scene: Scene, small: dict[str, Path]) -> None:
    """Also when there is nothing to do."""
    utils = module("comfy.utils")
    hook, seen = utils.PROGRESS_BAR_HOOK, []
    for _ in range(2):
        utils.set_progress_bar_global_hook(
            lambda value, total, preview, node_id=None: seen.append(value / total)
        )
        try:
            scene.pack.BuildAnyStory.execute(**GIVEN)
        finally:
            utils.set_progress_bar_global_hook(hook)
        assert seen == sorted(seen) and seen[-1] == 1
        seen.clear()


def test_it_recognises_the_adapter(scene: Scene, small: dict[str, Path]) -> None:
    """A file of torch.save, and another kind than the usual one, which the node says."""
    config = small_config()
    names = list(diffusers_unet(config).attn_processors)
    save_pickle(small["ipadapter"] / "mip.bin", with_gates(adapter_state(names, config)))
    shown = Queue(scene).run(ip_adapter="mip.bin")
    assert shown is not None and "mip.bin is MIP-Adapter" in shown
    loaded = scene.pack.LoadAnyStory.execute("made.safetensors").args[0]
    assert loaded.model.config.clip_branch.gate


def test_what_is_refused(scene: Scene, folders: dict[str, Path]) -> None:
    """The node finds both files in the host's folders, and names what they are instead."""
    build = module("anystory_pack.nodes.build")
    save(folders["checkpoints"] / "base.safetensors", {"x": torch.zeros(1)})
    shutil.copy(folders["checkpoints"] / "base.safetensors", folders["ipadapter"])
    for folder in ("ipadapter", "checkpoints"):
        (folders[folder] / "c.bin").write_bytes(b"x")
    assert build._listed("ipadapter") == ["base.safetensors", "c.bin"]
    assert build._listed("checkpoints") == ["base.safetensors"]
    given = {**GIVEN, "ip_adapter": "base.safetensors"}
    error = scene.errors.AnyStoryError
    with pytest.raises(error, match="BuildAnyStory: base.safetensors: it is no IP-Adapter"):
        build.BuildAnyStory.execute(**given)
    for name in ("../made", "", ".made", "a/b", "con", "a..b", "made.", " made"):
        with pytest.raises(error, match="BuildAnyStory: name: got"):
            build.BuildAnyStory.execute(**{**given, "name": name})
        build.BuildAnyStory.fingerprint_inputs(**{**given, "name": name})
    with pytest.raises(error, match="not in models/checkpoints"):
        build.BuildAnyStory.execute(**{**given, "checkpoint": "none.safetensors"})
    assert list(folders["anystory"].iterdir()) == []
