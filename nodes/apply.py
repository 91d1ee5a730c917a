"""ApplyAnyStory: a model that samples with the routed subjects."""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..anystory_core.config import REFERENCES, References
from ..anystory_core.errors import RoutingError
from ..anystory_core.injection.prepare import Settings, Timing
from ..anystory_core.subject.subject import SubjectOptions
from .bases import base_of
from .host import ids
from .host.base import Kept
from .host.handover import Handover
from .host.sockets import Routing, RoutingMaps
from .host.wrapper import SamplingWrapper

_OF_FILE = "as in the file"


class ApplyAnyStory(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        fraction = {"min": 0.0, "max": 1.0, "step": 0.01}
        strength = {"default": 1.0, "min": 0.0, "max": 5.0, "step": 0.05}
        return ids.schema(
            node_id="ApplyAnyStory",
            display_name="Apply AnyStory",
            category=ids.CATEGORY,
            description="Gives a model whose sampling puts the routed subjects into the picture. "
            "The model itself is never changed.",
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with, LoRAs included."),
                ids.Routing.Input("routing", tooltip="From Subject Router."),
                io.Float.Input(
                    "strength",
                    **strength,
                    tooltip="How strongly all subjects' concepts act (eta of Eq. 5), background "
                    "included. 1 is the paper, 0 is off.",
                ),
                io.Float.Input(
                    "reference_strength",
                    **strength,
                    tooltip="How strongly all subjects' details are copied (e to the gamma of "
                    "Eq. 7). 1 is the paper, less is freer, 0 is off.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    **fraction,
                    tooltip="Fraction of the sampling at which subjects begin to act.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    **fraction,
                    tooltip="Fraction of the sampling at which subjects stop to act. Less than 1 "
                    "leaves the last steps to the model.",
                ),
                io.Boolean.Input(
                    "references_in_uncond",
                    default=False,
                    tooltip="Keep the reference details in the unconditional (negative) rows. Off "
                    "makes the subjects act more strongly with cfg.",
                ),
                io.Combo.Input(
                    "references",
                    options=[_OF_FILE, *REFERENCES],
                    default=_OF_FILE,
                    optional=True,
                    tooltip="Which details of the subjects act. whole: of their whole cut-outs, as "
                    "in the paper. masked: without the empty space around them. masked in the "
                    "decoder: the same, in the second half of the U-Net alone. matched noise: the "
                    "model itself reads the cut-outs, noised as the picture is at each step "
                    "(slower; for weights whose references are not trained). off: none.",
                ),
                io.Float.Input(
                    "concept_start",
                    default=0.1,
                    **fraction,
                    optional=True,
                    tooltip="FLUX only: fraction of the sampling at which the subjects' concepts "
                    "enter the text. The authors use 0.1.",
                ),
                io.Float.Input(
                    "concept_end",
                    default=0.3,
                    **fraction,
                    optional=True,
                    tooltip="FLUX only: fraction of the sampling at which the concepts leave the "
                    "text. The authors use 0.3.",
                ),
                io.Float.Input(
                    "reference_start",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="FLUX only: fraction of the sampling at which details begin to be "
                    "copied. -1 is the authors' choice: 0 for one subject, 0.09 for more.",
                ),
                io.Float.Input(
                    "matched_start",
                    default=0.0,
                    **fraction,
                    optional=True,
                    tooltip="Only for references of matched noise: fraction of the sampling at "
                    "which they begin to act.",
                ),
                io.Float.Input(
                    "matched_end",
                    default=1.0,
                    **fraction,
                    optional=True,
                    tooltip="Only for references of matched noise: fraction of the sampling at "
                    "which they stop to act. Less than 1 leaves the last steps to the model.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                ids.Maps.Output(display_name="maps"),
            ],
        )

    @classmethod
    @ids.named_errors
    def execute(
        cls,
        model: Any,
        routing: Routing,
        strength: float = 1.0,
        reference_strength: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        references_in_uncond: bool = False,
        references: str = _OF_FILE,
        concept_start: float = 0.1,
        concept_end: float = 0.3,
        reference_start: float = -1.0,
        matched_start: float = 0.0,
        matched_end: float = 1.0,
    ) -> io.NodeOutput:
        timing = Timing(
            concept=(concept_start, concept_end),
            reference_start=None if reference_start < 0 else reference_start,
        )
        settings = Settings(
            strength=strength,
            reference_strength=reference_strength,
            keep_references_in_uncond=references_in_uncond,
            timing=timing,
            references=_references(references),
            matched_start=matched_start,
            matched_end=matched_end,
        )
        maps = RoutingMaps()
        patched = apply_routing(model, routing, settings, start, end, maps, node="ApplyAnyStory")
        return io.NodeOutput(patched, maps)


def _references(given: str) -> References | None:
    """The core's word for the input; RoutingError: unknown."""
    if given == _OF_FILE:
        return None
    if given not in REFERENCES:
        raise RoutingError(f"references: got {given!r}, expected one of {[_OF_FILE, *REFERENCES]}")
    return given


def is_applied(model: Any) -> bool:
    """Whether a ModelPatcher's sampling is routed already."""
    return bool(model.get_wrappers(WrappersMP.OUTER_SAMPLE, ids.WRAPPER_KEY))


def apply_routing(
    model: Any,
    routing: Routing,
    settings: Settings,
    start: float,
    end: float,
    maps: RoutingMaps,
    *,
    node: str | None = None,
    bar: bool = True,
    kept: Kept | None = None,
) -> Any:
    """A clone of ``model`` (a ModelPatcher) whose sampling runs are routed, and recorded in
    ``maps``; a plain clone without subjects. Values as in :class:`ApplyAnyStory`. ``node`` is named
    by what goes wrong in another node's sampling; ``bar``: that node's progress bar shows the
    preparations of a run; ``kept``: is shared with other models for the same subjects."""
    # The overall values obey the same rules as a subject's own.
    SubjectOptions(
        strength=settings.strength,
        reference_strength=settings.reference_strength,
        start=start,
        end=end,
    )
    if is_applied(model):
        raise RoutingError(
            "model: it already went through an ApplyAnyStory; connect all subjects to one "
            "SubjectRouter and apply it once"
        )
    patched = model.clone()
    if not routing.subjects:
        maps.unrouted = True
        return patched
    anystory = routing.anystory
    base = base_of(anystory)
    base.check(model, anystory, settings)
    handover = Handover()
    handover.attach(patched)
    wrapper = SamplingWrapper(base, routing, settings, start, end, maps, handover, node, bar, kept)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, ids.WRAPPER_KEY, wrapper)
    routers = base.routers(routing)
    if routers:
        patched.set_additional_models(ids.WRAPPER_KEY, routers)
    return patched
