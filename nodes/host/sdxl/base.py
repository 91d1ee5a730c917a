"""SDXL and models of its shape, as the nodes ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....anystory_core.injection.prepare import Settings
from ....anystory_core.routing.modes import check_routing
from ....anystory_core.subject.files import load_subject
from ....anystory_core.subject.grounding import check_phrases
from ....anystory_core.subject.subject import EncodedSubject, Subject, subjects_of
from ..base import EncodeRequest, RunRequest
from ..managed import ManagedAnyStory
from ..sockets import Routing
from ..texts import label_states
from . import encode
from .checks import check_model
from .passes import UNetPasses, prepare_passes, windows_of

PART_NAMES = {
    "subject_encoder": "subject encoder",
    "routing_encoder": "routing encoder",
    "reference_net": "ReferenceNet",
    "clip_projections": "CLIP projections",
    "reference_projections": "reference projections",
    "routers": "router",
}


class SDXLBase:
    """Implements :class:`..base.HostBase`."""

    def describe(self, anystory: ManagedAnyStory) -> str:
        model = anystory.model
        text = f"{anystory.name} ({model.config.name}): " + ", ".join(
            PART_NAMES[part] for part in model.parts
        )
        if model.routers is None:
            text += (
                ". No router: one subject, or several with masks or by the words of their labels."
            )
        if model.reference_net is None:
            text += ". No ReferenceNet: coarse likeness only."
        return text

    def encode(self, request: EncodeRequest) -> tuple[Subject, tuple[str, ...]]:
        return encode.encode(request)

    def load_subject(self, path: Path, anystory: ManagedAnyStory) -> Subject:
        return load_subject(path, anystory.model)

    def check_routing(
        self,
        anystory: ManagedAnyStory,
        mode: str,
        subjects: Sequence[EncodedSubject],
        masks: Sequence[Tensor | None],
        clip: Any,
        text_block: int,
    ) -> tuple[Tensor, ...]:
        model = anystory.model
        if subjects:
            check_routing(
                mode, model, subjects, masks, text=clip is not None, text_block=text_block
            )
            check_phrases(mode, subjects_of(Subject, subjects, model.fingerprint))
        if not mode.startswith("text"):
            return ()
        return label_states(clip, [subject.label for subject in subjects], model.config)

    def routers(self, routing: Routing) -> list[Any]:
        return []  # folded into keys before the first step

    def check(self, model: Any, anystory: ManagedAnyStory, settings: Settings) -> None:
        check_model(model, anystory.model.config, anystory.model.sites)

    def prepare(self, request: RunRequest) -> UNetPasses | None:
        windows = windows_of(request)
        if windows is None:
            return None
        request.check_masks()
        anystory = request.routing.anystory
        self.check(request.guider.model_patcher, anystory, request.settings)
        return prepare_passes(request, windows)

    def check_segmentation(self, anystory: ManagedAnyStory) -> None:
        pass

    def empty_conditioning(self, anystory: ManagedAnyStory) -> list[Any]:
        """Zero text states, which SDXL was trained to take for an empty prompt."""
        unet = anystory.model.config.unet
        states = torch.zeros(1, 77, unet.context_dim)
        return [[states, {"pooled_output": torch.zeros(1, unet.pooled_dim)}]]
