"""SDXL single files: every name and shape of the real one, and every number of a small one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sdxl_file
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.prediction import (
    Prediction,
    marks_of_file,
    prediction_of_file,
)
from anystory_core.errors import ModelMismatchError
from anystory_core.training.hosts.frozen import text_encoder
from anystory_core.training.hosts.single_file import (
    FileSizes,
    TextSizes,
    file_prediction,
    load_single_file,
    networks_of,
)
from anystory_core.training.hosts.sizes import diffusers_unet_config

SMALL = FileSizes(
    small=TextSizes(width=16, layers=3, heads=2, activation="quick_gelu"),
    large=TextSizes(width=24, layers=2, heads=2, activation="gelu"),
    vae_widths=(32, 32, 64),
)


def vae(widths: tuple[int, ...]) -> Any:
    count = len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        layers_per_block=2,
    )


def text(width: int, layers: int, heads: int, mlp: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        projection_dim=width,
        hidden_act=activation,
    )


def small_networks() -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(**diffusers_unet_config(tiny.config().unet)),
        vae((32, 32, 64)),
        CLIPTextModel(text(16, 3, 2, 64, "quick_gelu")),
        CLIPTextModelWithProjection(text(24, 2, 2, 96, "gelu")),
    )


def test_every_name_and_shape_of_sdxls_file() -> None:
    """On the meta device: no memory. The sizes are those of SDXL's published configuration."""
    config = AnyStoryConfig.sdxl()
    with torch.device("meta"):
        state = sdxl_file.file_tensors(
            config,
            UNet2DConditionModel(**diffusers_unet_config(config.unet)),
            vae((128, 256, 512, 512)),
            CLIPTextModel(text(768, 12, 12, 3072, "quick_gelu")),
            CLIPTextModelWithProjection(text(1280, 32, 20, 5120, "gelu")),
        )
        assert len(state) == 2515  # as many as sd_xl_base_1.0.safetensors holds
        unet, autoencoder, (small, large) = networks_of(state, config, "sdxl", FileSizes())
    assert unet.config.cross_attention_dim == small.config.hidden_size + large.config.hidden_size
    assert (small.config.num_attention_heads, large.config.num_attention_heads) == (12, 20)
    assert (small.config.hidden_act, large.config.hidden_act) == ("quick_gelu", "gelu")
    assert sum(p.numel() for p in small.parameters()) == 123_060_480
    assert sum(p.numel() for p in large.parameters()) == 694_659_840
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863


def test_a_small_files_numbers_come_back(tmp_path: Path) -> None:
    originals = small_networks()
    state = sdxl_file.file_tensors(tiny.config(), *originals)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / "base.safetensors")
    unet, autoencoder, encoders = load_single_file(
        tmp_path / "base.safetensors", tiny.config(), SMALL
    )
    for original, loaded in zip(originals, (unet, autoencoder, *encoders), strict=True):
        wanted, got = original.state_dict(), loaded.state_dict()
        assert wanted.keys() == got.keys()
        assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())
    states, pooled = text_encoder([x.eval() for x in encoders])(["a fox", "an owl and a fox"])
    assert states.shape == (2, 77, 16 + 24) and pooled.shape == (2, 24)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"cut off")
    with pytest.raises(ModelMismatchError, match=r"base\.safetensors is not a readable"):
        load_single_file(path, tiny.config(), SMALL)
    state = sdxl_file.file_tensors(tiny.config(), *small_networks())
    for prefix, words in (
        ("model.diffusion_model.input_blocks.0", "holds no U-Net"),
        ("model.diffusion_model.label_emb", "U-Net: .*add_embedding"),
        ("first_stage_model.encoder.mid", "VAE: .*encoder.mid_block"),
        ("conditioner.embedders.0", "CLIP-L: .*token_embedding"),
        ("conditioner.embedders.1", "CLIP-G: .*token_embedding"),
    ):
        rest = {k: v for k, v in state.items() if not k.startswith(prefix)}
        with pytest.raises(ModelMismatchError, match=f"base.safetensors .*{words}"):
            networks_of(rest, tiny.config(), path.name, SMALL)


def test_what_a_file_says_it_predicts(tmp_path: Path) -> None:
    """By tensors, as the host reads them, or in its header alone."""
    path, nothing = tmp_path / "base.safetensors", torch.zeros(1)
    for tensors, header, wanted in (
        ({}, {}, Prediction()),
        ({}, {"modelspec.prediction_type": "epsilon"}, Prediction()),
        ({}, {"modelspec.prediction_type": "v"}, Prediction("v")),
        ({"v_pred": nothing}, {}, Prediction("v")),
        ({"v_pred": nothing, "ztsnr": torch.ones(2)}, {}, Prediction("v", zero_snr=True)),
    ):
        save_file({"x": torch.ones(1), **tensors}, path, metadata=header)
        assert file_prediction(path) == wanted
    for tensors, header, mark in (
        ({"edm_mean": nothing}, {}, "edm_mean"),
        ({"edm_vpred.sigma_max": nothing}, {}, "edm_vpred.sigma_max"),
        ({}, {"modelspec.prediction_type": "sample"}, "sample"),
    ):
        save_file({"x": torch.ones(1), **tensors}, path, metadata=header)
        found = file_prediction(path)
        assert found.kind == "other" and found.mark == mark


def test_marks_are_read_back() -> None:
    for prediction in (Prediction(), Prediction("v"), Prediction("v", zero_snr=True)):
        assert prediction_of_file(marks_of_file(prediction), {}) == prediction
    with pytest.raises(ValueError, match="got other, expected epsilon or v"):
        marks_of_file(Prediction("other"))
