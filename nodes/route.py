"""SubjectRouter: who is in the picture, and by which rule each finds a place."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..anystory_core.errors import RoutingError
from ..anystory_core.routing.modes import MODES
from ..anystory_core.subject.subject import EncodedSubject
from .bases import base_of
from .host import ids, tensors
from .host.managed import ManagedAnyStory
from .host.sockets import Routing


class SubjectRouter(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        pairs: list[Any] = []
        for number in range(1, ids.MAX_SUBJECTS + 1):
            pairs.append(
                ids.Subject.Input(
                    f"subject_{number}",
                    optional=True,
                    tooltip=f"Subject {number}. Free numbers are skipped.",
                )
            )
            pairs.append(
                io.Mask.Input(
                    f"mask_{number}",
                    optional=True,
                    tooltip=f"Where subject {number} goes (1 = subject, of the whole picture, any "
                    "size). Used by the modes 'masks', 'learned within masks' and 'text within "
                    "masks'.",
                )
            )
        return ids.schema(
            node_id="SubjectRouter",
            display_name="Subject Router",
            category=ids.CATEGORY,
            description="Collects up to 8 subjects and decides how each finds its place: by the "
            "trained router, by your masks, by the words of their labels, or by router or words "
            "within your masks.",
            inputs=[
                ids.AnyStory.Input("anystory", tooltip="The weights that encoded the subjects."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="learned: the router decides. masks: your masks decide. learned within "
                    "masks: the router decides, but a subject never leaves its mask. text, text "
                    "within masks: the words of each subject's label decide; for weights without a "
                    "router. Needs the clip.",
                ),
                *pairs,
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The clip that encodes the prompt. Only used by the modes with text.",
                ),
                io.Boolean.Input(
                    "agreement",
                    default=True,
                    optional=True,
                    tooltip="In the mode 'learned', for two subjects or more: the blocks of the "
                    "U-Net decide together whose a place is, so that a subject which is only a "
                    "little ahead does not take every place. Off is the paper: each block for "
                    "itself.",
                ),
            ],
            outputs=[ids.Routing.Output(display_name="routing")],
        )

    @classmethod
    @ids.named_errors
    def execute(cls, anystory: ManagedAnyStory, mode: str, **inputs: Any) -> io.NodeOutput:
        subjects: list[EncodedSubject] = []
        masks: list[Any] = []
        clip, agree = inputs.pop("clip", None), inputs.pop("agreement", True)
        known = {f"{kind}_{n + 1}" for kind in ("subject", "mask") for n in range(ids.MAX_SUBJECTS)}
        unknown = sorted(set(inputs) - known)
        if unknown:
            raise RoutingError(
                f"{unknown[0]}: unknown input; a router takes subject_1 to "
                f"subject_{ids.MAX_SUBJECTS} and as many masks"
            )
        for number in range(1, ids.MAX_SUBJECTS + 1):
            subject, mask = inputs.get(f"subject_{number}"), inputs.get(f"mask_{number}")
            if subject is None:
                if mask is not None:
                    raise RoutingError(
                        f"mask_{number}: connected without subject_{number}; connect that subject "
                        "or disconnect the mask"
                    )
                continue
            subjects.append(subject)
            masks.append(None if mask is None else tensors.routing_mask(mask, f"mask_{number}"))
        labels = base_of(anystory).check_routing(anystory, mode, subjects, masks, clip)
        routing = Routing(anystory, tuple(subjects), tuple(masks), mode, labels, agree)
        return io.NodeOutput(routing)
