"""The one table of the U-Net's names, against diffusers' own converter and its own U-Net."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.names import LDM_PREFIX, ldm_to_diffusers
from anystory_core.training.hosts.sizes import diffusers_unet_config

from .public_weights import small_config

CONFIGS = {
    "sdxl": AnyStoryConfig.sdxl(),
    "mini": AnyStoryConfig.mini(),
    "small": small_config(),
    "shallow": small_config((0, 2, 1), middle=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_that_of_diffusers(name: str) -> None:
    """Every tensor of its U-Net, once, under the name that its single-file converter gives."""
    config = CONFIGS[name]
    table = ldm_to_diffusers(config)
    sizes = diffusers_unet_config(config.unet)
    named = {LDM_PREFIX + ldm: ldm for ldm in table}
    converted = single_file_utils.convert_ldm_unet_checkpoint(named, sizes)
    assert {ldm: theirs for theirs, ldm in converted.items()} == table
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sizes)
    assert sorted(table.values()) == sorted(unet.state_dict())
