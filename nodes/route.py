"""SubjectRouter: who is in the picture, and by which rule each finds a place."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..anystory_core.errors import RoutingError
from ..anystory_core.routing.masks import lost_subjects
from ..anystory_core.routing.modes import MODES
from ..anystory_core.subject.subject import EncodedSubject
from .bases import base_of
from .host import ids, tensors
from .host.managed import ManagedAnyStory
from .host.saying import say
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
                    "size; of a batch, each picture of the latent batch takes its own). Used by "
                    "the modes 'masks', 'learned within masks' and 'text within masks'.",
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
                    tooltip="In the mode 'learned': the blocks of the U-Net decide together whose "
                    "a place is, so that a subject which is only a little ahead does not take "
                    "every place, and one subject alone has every place while there is little but "
                    "noise, so that it is not drawn twice. Off is the paper: each block for "
                    "itself.",
                ),
                io.Int.Input(
                    "text_block",
                    default=0,
                    min=0,
                    max=128,
                    optional=True,
                    tooltip="In the modes with text: the number of the only block of the U-Net "
                    "whose words count; 0 is all. For SDXL public work found 48 best.",
                ),
            ],
            outputs=[ids.Routing.Output(display_name="routing")],
        )

    @classmethod
    @ids.named_errors
    def execute(cls, anystory: ManagedAnyStory, mode: str, **inputs: Any) -> io.NodeOutput:
        subjects: dict[int, EncodedSubject] = {}
        masks: dict[int, Any] = {}
        notes: list[str] = []
        clip, agree = inputs.pop("clip", None), inputs.pop("agreement", True)
        text_block = inputs.pop("text_block", 0)
        known = {f"{kind}_{n + 1}" for kind in ("subject", "mask") for n in range(ids.MAX_SUBJECTS)}
        unknown = sorted(set(inputs) - known)
        if unknown:
            raise RoutingError(
                f"{unknown[0]}: unknown input; a router takes subject_1 to "
                f"subject_{ids.MAX_SUBJECTS} and as many masks"
            )
        for number in range(1, ids.MAX_SUBJECTS + 1):
            subject, mask = inputs.get(f"subject_{number}"), inputs.get(f"mask_{number}")
            if subject is not None:
                subjects[number] = subject
                name = f"mask_{number}"
                masks[number] = None if mask is None else tensors.routing_mask(mask, name)
            elif mask is not None:
                notes.append(f"mask_{number} is left out: subject_{number} is missing or muted.")
        chosen, given = tuple(subjects.values()), tuple(masks.values())
        labels = base_of(anystory).check_routing(anystory, mode, chosen, given, clip, text_block)
        if mode.endswith("masks"):
            notes += lost_places(mode, subjects, masks)
        routing = Routing(anystory, chosen, given, mode, labels, agree, text_block)
        return io.NodeOutput(routing, ui={"text": say(notes)})


def lost_places(mode: str, subjects: dict[int, EncodedSubject], masks: dict[int, Any]) -> list[str]:
    """One sentence for each subject that its mask leaves without any place in the picture."""
    named = {f"mask_{number}": mask for number, mask in masks.items()}
    lost = lost_subjects(named, exclusive=mode == "masks")
    return [
        f"Subject {number} ('{subject.label}') gets no place: {lost[f'mask_{number}']}."
        for number, subject in subjects.items()
        if f"mask_{number}" in lost
    ]
