"""FLUX.1-dev, as the nodes ask for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ....anystory_core.bases.flux.windows import full_steps
from ....anystory_core.errors import RoutingError
from ....anystory_core.injection.flux import check_flux_routing, check_settings, prepare_flux
from ....anystory_core.injection.prepare import Settings
from ....anystory_core.subject.flux import FluxSubject, load_flux_subject
from ....anystory_core.subject.subject import EncodedSubject
from ..base import EncodeRequest, RunRequest
from ..conds import Roles
from ..managed import ManagedAnyStory
from ..sockets import Routing
from ..windows import Ramp
from . import encode
from .checks import check_model
from .passes import FluxPasses
from .patches import BlockTable

PART_NAMES = {
    "subject_redux": "subject Redux",
    "routing_redux": "routing Redux",
    "reference_branches": "reference branches",
    "router_branches": "router branches",
    "routing_maps": "routing maps",
}


class FluxBase:
    """Implements :class:`..base.HostBase`."""

    def describe(self, anystory: ManagedAnyStory) -> str:
        model = anystory.model
        parts = ", ".join(PART_NAMES[part] for part in model.parts)
        text = f"{anystory.name} (for FLUX.1-dev, {model.config.name}): {parts}"
        return text if model.routes else f"{text}. No router: one subject, or several with masks."

    def encode(self, request: EncodeRequest) -> tuple[FluxSubject, tuple[str, ...]]:
        return encode.encode(request)

    def load_subject(self, path: Path, anystory: ManagedAnyStory) -> FluxSubject:
        return load_flux_subject(path, anystory.model)

    def check_routing(
        self,
        anystory: ManagedAnyStory,
        mode: str,
        subjects: Sequence[EncodedSubject],
        masks: Sequence[Tensor | None],
        clip: Any,
        text_block: int,
    ) -> tuple[Tensor, ...]:
        check_flux_routing(mode, anystory.model, subjects, masks)
        return ()

    def routers(self, routing: Routing) -> list[Any]:
        if len(routing.subjects) < 2 or not routing.mode.startswith("learned"):
            return []
        return routing.anystory.having("branches.router", "branches.maps")

    def check(self, model: Any, anystory: ManagedAnyStory, settings: Settings) -> None:
        check_settings(settings)
        check_model(model, anystory.model.config)

    def prepare(self, request: RunRequest) -> FluxPasses | None:
        guider, routing, sigmas = request.guider, request.routing, request.sigmas
        model, weights = guider.model_patcher, routing.anystory.model
        sampling = model.get_model_object("model_sampling")
        steps = max(1, sigmas.shape[-1] - 1)
        first = float(sigmas[0]) if len(sigmas) else math.inf
        run = prepare_flux(
            routing.mode,
            weights,
            routing.subjects,
            routing.masks,
            request.settings,
            window=(request.start, request.end),
            steps=full_steps(steps, first, sampling.percent_to_sigma),
            to_sigma=lambda fraction: float(sampling.percent_to_sigma(fraction)),
            ramps=[Ramp.of(subject.options, sampling) for subject in routing.subjects],
        )
        if run.idle:
            return None
        request.check_masks()
        self.check(model, routing.anystory, request.settings)
        request.advance(1)
        dtype = model.model.manual_cast_dtype or model.model.get_dtype()
        moved = run.to(model.load_device, dtype)
        request.advance(1)
        return FluxPasses(
            record=request.record,
            roles=Roles.of(guider),
            run=moved,
            branches=weights.reference_branches,
            table=BlockTable(weights.sites),
        )

    def check_segmentation(self, anystory: ManagedAnyStory) -> None:
        raise RoutingError(
            "routing: its AnyStory weights are for FLUX, whose router has no background: it gives "
            "every place of a picture to some subject, so its maps are no masks; use AnyStory "
            "weights for SDXL to segment"
        )

    def empty_conditioning(self, anystory: ManagedAnyStory) -> list[Any]:
        raise RoutingError("positive: FLUX has no empty prompt without its text encoders")
