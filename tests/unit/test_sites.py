"""The one table of blocks, against the real U-Net of diffusers and against explicit facts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.names import ldm_to_diffusers
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.training.hosts.sizes import diffusers_unet_config

CONFIGS = {"sdxl": AnyStoryConfig.sdxl(), "mini": AnyStoryConfig.mini()}


def test_sdxl_blocks() -> None:
    sites = build_sites(AnyStoryConfig.sdxl().unet)
    counts = Counter((s.part, s.number) for s in sites)
    assert counts == {
        ("input", 4): 2, ("input", 5): 2, ("input", 7): 10, ("input", 8): 10, ("middle", 0): 10,
        ("output", 0): 10, ("output", 1): 10, ("output", 2): 10,
        ("output", 3): 2, ("output", 4): 2, ("output", 5): 2,
    }  # fmt: skip
    assert [s.index for s in sites] == list(range(1, 71))
    assert {(s.channels, s.heads, s.stride) for s in sites} == {(640, 10, 2), (1280, 20, 4)}


def test_mini_has_16() -> None:
    assert len(build_sites(AnyStoryConfig.mini().unet)) == 16


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_those_of_diffusers(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**diffusers_unet_config(config.unet))
    sites = build_sites(config.unet)
    for site in sites:
        block = unet.get_submodule(site.diffusers)
        assert block.attn1.to_q.in_features == site.channels
        assert block.attn1.heads == site.heads
    # The public IP-Adapter files number attention layers in the order of `attn_processors`.
    order = list(unet.attn_processors)
    for site in sites:
        assert order[site.ip_adapter] == f"{site.diffusers}.attn2.processor"
    table = ldm_to_diffusers(config)
    assert set(table.values()) == set(unet.state_dict())
    for site in sites:
        assert table[f"{site.ldm}.attn2.to_k.weight"] == f"{site.diffusers}.attn2.to_k.weight"
