"""Public weights -> our file: wrong files are named, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anystory_core.errors import CheckpointError
from anystory_core.weights.checkpoint import read_header, save_model
from anystory_core.weights.convert import adapters as convert_adapters
from anystory_core.weights.convert import write as convert_write
from anystory_core.weights.convert.conversion import convert
from anystory_core.weights.convert.plan import Piece
from anystory_core.weights.fingerprint import file_sha256

from .public_weights import diffusers_unet, ldm_state, run, save, save_pickle, small_config

CONFIG = small_config()


def refuse(tmp_path: Path, checkpoint: Path, ip: Path, *words: str, **options) -> None:
    """Conversion fails with all words in its message and leaves no file behind."""
    out = tmp_path / "out" / "never.safetensors"
    with pytest.raises(CheckpointError) as error:
        convert(checkpoint, ip, out, **{"config": CONFIG, **options})
    for word in words:
        assert word in str(error.value), str(error.value)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def lora() -> dict[str, Tensor]:
    return {
        "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(4, 64),
        "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.zeros(64, 4),
    }


def other_base(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """A checkpoint whose cross-attention reads text states of another width."""
    return {
        k: torch.zeros(v.shape[0], width) if k.endswith(("attn2.to_k.weight",)) else v
        for k, v in state.items()
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: lora(), ["base.safetensors", "a LoRA"]),
        (lambda s: other_base(s, 768), ["Stable Diffusion 1.5", "768", "small (48)"]),
        (lambda s: other_base(s, 1280), ["the SDXL refiner"]),
        (lambda s: {"model.double_blocks.0.a": torch.zeros(1)}, ["Flux"]),
        (lambda s: {"image_proj.latents": torch.zeros(1)}, ["an IP-Adapter"]),
        (lambda s: {"reference_net.x": torch.zeros(1)}, ["already an AnyStory file"]),
        (lambda s: {"anything": torch.zeros(1)}, ["no U-Net"]),
        (lambda s: {**s, "edm_mean": torch.zeros(4)}, ["Playground"]),
        (
            lambda s: {k: v for k, v in s.items() if "middle_block.1.transformer" not in k},
            ["tensors of small are missing", "middle_block.1"],
        ),
        (
            lambda s: {
                k: v.to(torch.int8) if k.endswith("middle_block.0.in_layers.2.weight") else v
                for k, v in s.items()
            },
            ["quantised (I8)"],
        ),
        (
            lambda s: {
                k: v * float("nan") if k.endswith("middle_block.0.in_layers.2.bias") else v
                for k, v in s.items()
            },
            ["middle_block.0.in_layers.2.bias", "not finite; base.safetensors is damaged"],
        ),
        (
            lambda s: {
                k: v + 1e6 if k.endswith("middle_block.0.in_layers.2.bias") else v
                for k, v in s.items()
            },
            ["65504", "bf16"],
        ),
    ],
)
def test_wrong_checkpoints_are_named(tmp_path, unet, adapter, change, words) -> None:
    checkpoint = save(tmp_path / "base.safetensors", change(unet))
    refuse(tmp_path, checkpoint, save(tmp_path / "plus.safetensors", adapter), *words)


def test_of_a_folder_the_file_is_named(tmp_path, adapter) -> None:
    """One of a diffusers folder's is damaged, which needs not be fetched whole again."""
    folder = tmp_path / "unet"
    diffusers_unet(CONFIG).save_pretrained(folder, max_shard_size="1MB")
    key = "mid_block.resnets.0.conv2.bias"
    index = json.loads(next(folder.glob("*.index.json")).read_text())
    damaged = folder / index["weight_map"][key]
    tensors = load_file(damaged)
    save_file({**tensors, key: tensors[key] * torch.nan}, damaged)
    ip = save(tmp_path / "plus.safetensors", adapter)
    refuse(tmp_path, folder, ip, f"not finite; {damaged.name} is damaged")


@pytest.mark.parametrize("mark", ["scale_weight", "weight_scale", "comfy_quant", "header"])
@pytest.mark.parametrize("which", ["base", "plus"])
def test_scaled_weights_are_named(tmp_path, unet, adapter, mark, which) -> None:
    """Without their scales, which only the host knows how to apply, 8-bit numbers mean nothing."""
    tensors = {"base": unet, "plus": adapter}
    key = {
        "base": "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k.weight",
        "plus": "ip_adapter.1.to_k_ip.weight",
    }[which]
    layer = key.removesuffix("weight")
    changed = {**tensors[which], key: tensors[which][key].to(torch.float8_e4m3fn)}
    metadata = {}
    if mark == "header":
        metadata["_quantization_metadata"] = json.dumps({"layers": {layer[:-1]: {}}})
    else:
        changed[layer + mark] = torch.ones(1)
    files = {n: save(tmp_path / f"{n}.safetensors", t) for n, t in tensors.items()}
    save_file(changed, files[which], metadata=metadata)
    words = f"{which}.safetensors", key, "quantised (scaled 8-bit)", "use the fp16 or bf16 file"
    refuse(tmp_path, files["base"], files["plus"], *words)


@pytest.mark.parametrize(("channels", "kind"), [(9, "inpainting"), (8, "edit")])
def test_other_inputs_are_named(tmp_path, adapter, channels, kind) -> None:
    checkpoint = save(tmp_path / "base.safetensors", ldm_state(CONFIG, channels=channels))
    ip = save(tmp_path / "plus.safetensors", adapter)
    refuse(tmp_path, checkpoint, ip, kind, f"takes {channels} channels")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {**s, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(4, 64)}, ["FaceID"]),
        (
            lambda s: {"image_proj.proj.0.weight": torch.zeros(8, 512), "ip_adapter.1.x": s["x"]},
            ["FaceID"],
        ),
        (
            lambda s: {"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(8, 8)},
            ["FaceID Plus"],
        ),
        (lambda s: {"image_proj.proj.weight": torch.zeros(8, 8)}, ["a plain IP-Adapter"]),
        (
            lambda s: {**s, "image_proj.proj_in.weight": torch.zeros(64, 512)},
            ["InstantID"],
        ),
        (
            lambda s: {
                **s,
                "image_proj.proj_out.weight": torch.zeros(768, 64),
                "image_proj.proj_out.bias": torch.zeros(768),
            },
            ["Stable Diffusion 1.5", "768", "small (48)"],
        ),
        (
            lambda s: {**s, "ip_adapter.1.to_k_ip.weight": torch.zeros(96, 48)},
            ["ip_adapter.1.to_k_ip.weight", "(96, 48)", "(64, 48)"],
        ),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("ip_adapter.3.")},
            ["2 tensors of small are missing", "ip_adapter.3.to_k_ip.weight"],
        ),
        (lambda s: lora(), ["a LoRA"]),
        (lambda s: {"x": s["x"]}, ["no IP-Adapter"]),
    ],
)
def test_wrong_adapters_are_named(tmp_path, unet, adapter, change, words) -> None:
    changed = change({**adapter, "x": torch.zeros(1)})
    ip = save(tmp_path / "adapter.safetensors", changed)
    checkpoint = save(tmp_path / "base.safetensors", unet)
    refuse(tmp_path, checkpoint, ip, "adapter.safetensors", *words)


def test_plus_face_by_name_and_by_hash(tmp_path, unet, adapter, monkeypatch) -> None:
    """It has the names and shapes of the general file, so only these two tell."""
    checkpoint = save(tmp_path / "base.safetensors", unet)
    face = save(tmp_path / "ip-adapter-plus-face_sdxl_vit-h.safetensors", adapter)
    refuse(tmp_path, checkpoint, face, "'plus-face'")
    renamed = save(tmp_path / "renamed.safetensors", adapter)
    digest = file_sha256(renamed)
    monkeypatch.setattr(convert_adapters, "_FACE_FILES", {digest})
    refuse(tmp_path, checkpoint, renamed, "renamed.safetensors", "'plus-face'")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("which", ["base", "plus"])
def test_cut_files_are_named(tmp_path, unet, adapter, share, which) -> None:
    files = {
        "base": save(tmp_path / "base.safetensors", unet),
        "plus": save(tmp_path / "plus.safetensors", adapter),
    }
    size = files[which].stat().st_size
    os.truncate(files[which], int(size * share))
    refuse(tmp_path, files["base"], files["plus"], f"{which}.safetensors", "cut off")


def test_other_suffixes_missing_files_and_folders(tmp_path, unet, adapter) -> None:
    ip = save(tmp_path / "plus.safetensors", adapter)
    checkpoint = save(tmp_path / "base.safetensors", unet)
    other = tmp_path / "plus.onnx"
    other.write_bytes(ip.read_bytes())
    refuse(tmp_path, checkpoint, other, "plus.onnx", "expected a .safetensors file")
    refuse(tmp_path, save_pickle(tmp_path / "base.ckpt", unet), ip, "base.ckpt", "never opened")
    refuse(tmp_path, tmp_path / "nothing.safetensors", ip, "no such file")
    refuse(tmp_path, checkpoint, tmp_path / "nothing.safetensors", "no such file")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, tmp_path / "empty", ip, "no diffusion_pytorch_model")
    base = diffusers_unet(CONFIG)
    base.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    next((tmp_path / "shards").glob("*-00002-of-*.safetensors")).unlink()
    refuse(tmp_path, tmp_path / "shards", ip, "00002", "which are not in it")
    with pytest.raises(CheckpointError, match="one of the sources"):
        convert(checkpoint, ip, checkpoint, config=CONFIG)
    assert load_file(checkpoint).keys() == unet.keys()
    refuse(tmp_path, checkpoint, ip, "expected one of", reference_net="all")
    with pytest.raises(CheckpointError, match="needs a checkpoint"):
        convert(None, ip, tmp_path / "d.safetensors", config=CONFIG)


def test_full_disk_leaves_the_old_file(tmp_path, unet, adapter, monkeypatch) -> None:
    """Both ways a disk can be full: seen before writing, and met in the middle of it."""
    checkpoint = save(tmp_path / "base.safetensors", unet)
    ip = save(tmp_path / "plus.safetensors", adapter)
    out = tmp_path / "out" / "a.safetensors"
    convert(None, ip, out, config=CONFIG, reference_net="none")
    old = out.read_bytes()

    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patched:
        patched.setattr(convert_write.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(CheckpointError, match=r"needs 0\.\d+ GB .* make room"):
            convert(checkpoint, ip, out, config=CONFIG)

    made = Piece.make
    count = 0

    def full(piece):
        nonlocal count
        count += 1
        if count == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return made(piece)

    monkeypatch.setattr(Piece, "make", full)
    with pytest.raises(CheckpointError, match="the disk became full"):
        convert(checkpoint, ip, out, config=CONFIG)
    assert [p.name for p in out.parent.iterdir()] == ["a.safetensors"]
    assert out.read_bytes() == old


@pytest.mark.parametrize("kind", ["trained", "trained further", "damaged"])
def test_files_of_another_making_are_not_replaced(tmp_path, unet, adapter, kind) -> None:
    done, tensors = run(tmp_path, unet, adapter)
    header = read_header(done.path)
    metadata = {"anystory.router_steps": "10"}
    if kind == "trained further":
        metadata |= header.metadata
    save_model(done.path, tensors, header.config, metadata=metadata)
    if kind == "damaged":
        os.truncate(done.path, 4)
    before = done.path.read_bytes()
    with pytest.raises(CheckpointError, match=f"{done.path.name}: is there .* another name"):
        run(tmp_path, unet, adapter)
    assert done.path.read_bytes() == before


def test_interruption_leaves_nothing(tmp_path, unet, adapter) -> None:
    """While the sources are read for their checksums, and while tensors are written."""
    for share in (0.01, 0.9):

        def stop(done: int, total: int, share: float = share) -> None:
            if done >= share * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, unet, adapter, progress=stop)
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
