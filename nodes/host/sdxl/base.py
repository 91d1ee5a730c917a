"""SDXL and models of its shape, as the nodes ask for them."""

from __future__ import annotations

from typing import Any

import torch

from ..base import RunRequest
from ..managed import ManagedAnyStory
from .checks import check_model
from .passes import UNetPasses, prepare_passes


class SDXLBase:
    """Implements :class:`..base.HostBase`."""

    def check(self, model: Any, anystory: ManagedAnyStory) -> None:
        check_model(model, anystory.model.config, anystory.model.sites)

    def prepare(self, request: RunRequest) -> UNetPasses:
        self.check(request.guider.model_patcher, request.routing.anystory)
        return prepare_passes(request)

    def empty_conditioning(self, anystory: ManagedAnyStory) -> list[Any]:
        """Zero text states, which SDXL was trained to take for an empty prompt."""
        unet = anystory.model.config.unet
        pooled = unet.adm_channels - 6 * 256
        states = torch.zeros(1, 77, unet.context_dim)
        return [[states, {"pooled_output": torch.zeros(1, pooled)}]]
