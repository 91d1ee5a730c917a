"""EncodeSubject and AnyStorySubjectOptions: pictures of a subject -> an encoded subject."""

from __future__ import annotations

from typing import Any

import comfy.utils
from comfy_api.latest import io, ui
from torch import Tensor

from ..anystory_core.errors import SubjectError
from ..anystory_core.subject.masks import MASK_SHOWS
from ..anystory_core.subject.subject import EASINGS, EncodedSubject, SubjectOptions
from .bases import base_of
from .host import ids, tensors
from .host.base import EncodeRequest
from .host.managed import ManagedAnyStory
from .host.saying import say


class EncodeSubject(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return ids.schema(
            node_id="EncodeSubject",
            display_name="Encode Subject",
            category=ids.CATEGORY,
            description="Cuts a subject out of its picture(s) and encodes it, once, for any number "
            "of sampling runs.",
            inputs=[
                ids.AnyStory.Input("anystory", tooltip="From Load AnyStory or the mini loader."),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The CLIP vision model that the weights were trained with "
                    "(SDXL: ViT-H/14; FLUX: sigclip_vision_patch14_384).",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the model that will sample."),
                io.Image.Input(
                    "image", tooltip="One picture, or a batch of pictures of the same subject."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the subject is, as mask_shows says. Without it a plain "
                    "background is cut away, or the whole picture is taken.",
                ),
                io.Boolean.Input(
                    "invert_mask",
                    default=False,
                    tooltip="Turns the mask over before mask_shows is read; auto does without. In "
                    "older graphs on for Load Image, which gives 1 - alpha.",
                ),
                io.String.Input(
                    "label",
                    default="",
                    tooltip="A short name, shown in the routing maps. Leave empty for 'subject'. "
                    "Routing by text reads it: use the words that name the subject in the prompt.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for weights that read the label's text (converted from "
                    "MS-Diffusion, or with the original ReferenceNet) and for references at "
                    "matched noise: the clip of the model that will sample.",
                ),
                io.Combo.Input(
                    "mask_shows",
                    options=list(MASK_SHOWS),
                    default="subject",
                    optional=True,
                    tooltip="What is white in the mask. auto: the side with most of the border is "
                    "the background, so both Load Image's alpha and a painted mask are right.",
                ),
            ],
            outputs=[ids.Subject.Output(display_name="subject")],
        )

    @classmethod
    @ids.named_errors
    def execute(
        cls,
        anystory: ManagedAnyStory,
        clip_vision: Any,
        vae: Any,
        image: Tensor,
        mask: Tensor | None = None,
        invert_mask: bool = False,
        label: str = "",
        clip: Any = None,
        mask_shows: str = "subject",
    ) -> io.NodeOutput:
        subject, notes = base_of(anystory).encode(
            EncodeRequest(
                anystory=anystory,
                clip_vision=clip_vision,
                vae=vae,
                image=image,
                mask=mask,
                invert_mask=invert_mask,
                mask_shows=mask_shows,
                label=label,
                clip=clip,
                advance=comfy.utils.ProgressBar(3).update,
            )
        )
        preview = ui.PreviewImage(tensors.uint8_picture(subject.cutout), cls=cls).as_dict()
        preview["text"] = say(notes)
        return io.NodeOutput(subject, ui=preview)


class AnyStorySubjectOptions(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        fraction = {"min": 0.0, "max": 1.0, "step": 0.01}
        strength = {"default": 1.0, "min": 0.0, "max": 5.0, "step": 0.05}
        return ids.schema(
            node_id="AnyStorySubjectOptions",
            display_name="AnyStory Subject Options",
            category=ids.CATEGORY,
            description="Strength and time window of one subject.",
            inputs=[
                ids.Subject.Input("subject", tooltip="From Encode Subject."),
                io.Float.Input(
                    "strength",
                    **strength,
                    tooltip="How strongly the subject's concept acts; multiplied by the overall "
                    "strength. 1 is the paper, 0 is off.",
                ),
                io.Float.Input(
                    "reference_strength",
                    **strength,
                    tooltip="How strongly the subject's details are copied; multiplied by the "
                    "overall reference strength. 1 is the paper, 0 is off.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    **fraction,
                    tooltip="Fraction of the sampling at which the subject begins to act.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    **fraction,
                    tooltip="Fraction of the sampling at which the subject stops to act.",
                ),
                io.Float.Input(
                    "strength_at_start",
                    **strength,
                    tooltip="Factor of both strengths at start. From here it goes to that at end.",
                ),
                io.Float.Input(
                    "strength_at_end",
                    **strength,
                    tooltip="Factor of both strengths at end. With 1 at both ends they stay as "
                    "they are.",
                ),
                io.Combo.Input(
                    "easing",
                    options=list(EASINGS),
                    default="linear",
                    tooltip="How the factor goes from one end to the other: evenly, slowly at the "
                    "beginning, slowly at the end, or slowly at both.",
                ),
            ],
            outputs=[ids.Subject.Output(display_name="subject")],
        )

    @classmethod
    @ids.named_errors
    def execute(
        cls,
        subject: EncodedSubject,
        strength: float,
        reference_strength: float,
        start: float,
        end: float,
        strength_at_start: float = 1.0,
        strength_at_end: float = 1.0,
        easing: str = "linear",
    ) -> io.NodeOutput:
        if not isinstance(subject, EncodedSubject):
            raise SubjectError(f"subject: got {type(subject).__name__}, expected a subject")
        options = SubjectOptions(
            strength=strength,
            reference_strength=reference_strength,
            start=start,
            end=end,
            at_start=strength_at_start,
            at_end=strength_at_end,
            easing=easing,
        )
        return io.NodeOutput(subject.with_options(options))
