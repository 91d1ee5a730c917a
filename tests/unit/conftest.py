"""Public weights of a small model, made once; and both ways of injection."""

from __future__ import annotations

import pytest
from torch import Tensor

from anystory_core.injection import call as conditioner

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


@pytest.fixture(params=["by region", "masked", "masked, long rows"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the ways in turn, for rows that are all too short for the first and the last."""
    monkeypatch.setattr(conditioner, "by_region", lambda q: request.param == "by region")
    if request.param == "masked, long rows":  # as on a GPU: plain rows apart
        monkeypatch.setattr(conditioner, "LEAST_SORTED", 1)
    return request.param
