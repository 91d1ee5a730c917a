"""Which public adapter a file is, by its names alone; and files of ``torch.save``."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.errors import CheckpointError
from anystory_core.weights.checkpoint import read_header
from anystory_core.weights.convert import pickles
from anystory_core.weights.convert.conversion import convert
from anystory_core.weights.convert.kinds import recognise

from .public_weights import save, save_pickle, small_config, with_gates

CONFIG = small_config()
PLUS = {"image_proj.latents": (1, 16, 8), "image_proj.proj_in.weight": (8, 40)}
KEYS = {"ip_adapter.1.to_k_ip.weight": (8, 48)}


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        (PLUS | KEYS, "IP-Adapter Plus"),
        (PLUS | KEYS | {"ip_adapter.1.text_to_weight.weight": (1, 8)}, "MIP-Adapter"),
        (
            {
                "image_proj.grounding_latents": (1, 16, 8),
                "ms_adapter.1.to_k_ip.weight": (8, 48),
                "dummy_image_tokens": (1, 4, 48),
            },
            "MS-Diffusion",
        ),
    ],
)
def test_ours_are_recognised(shapes, kind) -> None:
    assert recognise("a.bin", shapes) == kind


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"ref.a": (1,), "redux.b": (1,), "router.c": (1,)}, "AnyStory for FLUX, .*convert flux"),
        ({"image_proj_model.a": (1,), "adapter_modules.1.b": (1,)}, "MUSE"),
        (PLUS | KEYS | {"image_proj.bg_embed": (1, 20, 8)}, "StoryMaker"),
        (
            {"id_adapter.latents": (1, 32, 8), "id_adapter_attn_layers.1.id_to_k.weight": (8, 8)},
            "PuLID",
        ),
        ({"image_proj.id_embedding_mapping.0.weight": (8, 8)} | KEYS, "PuLID"),
        ({"pulid_encoder.a": (1,), "pulid_ca.0.b": (1,)}, "PuLID"),
        (PLUS | KEYS | {"image_proj.proj_in.weight": (8, 512)}, "InstantID"),
        (PLUS | KEYS | {"ip_adapter.0.to_q_lora.down.weight": (4, 8)}, "FaceID"),
        ({"image_proj.proj.0.weight": (8, 512)} | KEYS, "FaceID"),
        ({"image_proj.proj.0.weight": (8, 1280)} | KEYS, "full-face"),
        ({"image_proj.proj.weight": (8, 8)} | KEYS, "plain IP-Adapter"),
        ({"image_proj.perceiver_resampler.proj_in.weight": (8, 8)} | KEYS, "FaceID Plus"),
        ({"lora_unet_x.lora_down.weight": (4, 8)}, "a LoRA"),
        ({"unet.x.lora_A.weight": (4, 8)}, "a LoRA"),
        ({"input_blocks.0.0.weight": (8, 4)}, "a checkpoint without an IP-Adapter"),
        ({"encoder.subject.latents": (1, 16, 8)}, "an AnyStory file already"),
        ({"x": (1,)}, "no IP-Adapter"),
    ],
)
def test_others_are_named(shapes, words) -> None:
    with pytest.raises(CheckpointError, match=rf"a\.bin: it is .*{words}"):
        recognise("a.bin", shapes)


def made(adapter: Path, out: Path) -> dict[str, Tensor]:
    done = convert(None, adapter, out, config=CONFIG, reference_net="none", dtype=torch.float32)
    return load_file(done.path)


@pytest.mark.parametrize("kind", ["plus", "mip"])
def test_a_pickle_gives_the_same_file(tmp_path, adapter, kind) -> None:
    """Groups as the authors store them; the dtype of the tensors is theirs."""
    state = with_gates(adapter) if kind == "mip" else adapter
    plain = made(save(tmp_path / "a.safetensors", state), tmp_path / "one.safetensors")
    pickled = save_pickle(tmp_path / "a.bin", {**state, "extra": torch.zeros(2)})
    again = made(pickled, tmp_path / "two.safetensors")
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    source = read_header(tmp_path / "two.safetensors").metadata["anystory.source.ip_adapter"]
    assert source.startswith("a.bin sha256:")
    config = read_header(tmp_path / "two.safetensors").config
    assert config.clip_branch.gate == (kind == "mip")
    assert ("projections.clip.1.gate.weight" in plain) == (kind == "mip")


class Program:
    """What a pickle may run when it is opened by Python's own reader."""

    def __reduce__(self):
        return os.mkdir, (os.environ["ANYSTORY_TEST_FOLDER"],)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, adapter, monkeypatch) -> None:
    target = tmp_path / "it was run"
    monkeypatch.setenv("ANYSTORY_TEST_FOLDER", str(target))
    path = tmp_path / "bad.bin"
    torch.save({"image_proj": dict(adapter), "evil": Program()}, path)
    with pytest.raises(CheckpointError, match=r"bad\.bin: .*weights-only reader refuses it"):
        made(path, tmp_path / "out.safetensors")
    assert not target.exists() and not (tmp_path / "out.safetensors").exists()
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:  # the program is real
        inner = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        assert b"mkdir" in archive.read(inner)


def test_old_torch_is_refused(tmp_path, adapter, monkeypatch) -> None:
    path = save_pickle(tmp_path / "a.bin", adapter)
    for version in ("2.5.1", "1.13.0+cu117", "unknown"):
        monkeypatch.setattr(pickles.torch, "__version__", version)
        with pytest.raises(CheckpointError, match=rf"PyTorch {version[:4]}.*cannot read safely"):
            made(path, tmp_path / "out.safetensors")
    monkeypatch.setattr(pickles.torch, "__version__", "2.6.0")
    assert made(path, tmp_path / "out.safetensors")


@pytest.mark.parametrize("damage", ["cut", "flipped", "no zip", "a list", "empty"])
def test_damaged_pickles_are_named(tmp_path, adapter, damage) -> None:
    path = save_pickle(tmp_path / "a.bin", adapter)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    if damage == "no zip":
        path.write_bytes(pickle.dumps({"image_proj": 1}))
    if damage == "a list":
        torch.save([torch.zeros(1)], path)
    if damage == "empty":
        torch.save({}, path)
    words = {
        "cut": "cut off",
        "flipped": "is damaged",
        "no zip": "no file of torch.save",
        "a list": "holds a list",
        "empty": "holds no tensors",
    }
    with pytest.raises(CheckpointError, match=rf"a\.bin: .*{words[damage]}"):
        made(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_only_the_converter_opens_pickles() -> None:
    """No other file of the core calls PyTorch's reader on a path, and none Python's."""
    core = Path(pickles.__file__).parents[2]
    found = {
        path.relative_to(core).as_posix()
        for path in core.rglob("*.py")
        if "torch.load" in path.read_text() or "import pickle" in path.read_text()
    }
    allowed = {"weights/convert/pickles.py"}
    assert {name for name in found if not name.startswith(("training/", "data/"))} == allowed


def test_older_headers_stay_as_they_are(tmp_path, adapter) -> None:
    """What a configuration has got since is left out of a header at its default, and may miss."""
    config = AnyStoryConfig.sdxl()
    assert "clip_branch" not in config.to_json()
    assert AnyStoryConfig.from_json(config.to_json()) == config
    save(tmp_path / "a.safetensors", with_gates(adapter))
    made(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    text = read_header(tmp_path / "b.safetensors").metadata["anystory.config"]
    assert '"gate":true' in text and AnyStoryConfig.from_json(text).to_json() == text
