"""Public weights of a small model, made once."""

from __future__ import annotations

import pytest
from torch import Tensor

from .public_weights import adapter_state, diffusers_unet, ldm_state, small_config


@pytest.fixture(scope="module")
def names() -> list[str]:
    return list(diffusers_unet(small_config()).attn_processors)


@pytest.fixture(scope="module")
def adapter(names: list[str]) -> dict[str, Tensor]:
    return adapter_state(names, small_config())


@pytest.fixture(scope="module")
def unet() -> dict[str, Tensor]:
    return ldm_state(small_config())
