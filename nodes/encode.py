"""EncodeSubject and AnyStorySubjectOptions: pictures of a subject -> an encoded subject."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..anystory_core.bases.sdxl.config import AnyStoryConfig
from ..anystory_core.errors import ModelMismatchError, SubjectError
from ..anystory_core.subject.encoder import (
    PictureStates,
    encode_subject,
    reference_latents,
    reference_memory,
)
from ..anystory_core.subject.label import clean_label
from ..anystory_core.subject.masks import MASK_SHOWS
from ..anystory_core.subject.preprocess import Views, prepare_views, zero_clip
from ..anystory_core.subject.subject import EASINGS, Subject, SubjectOptions
from ..anystory_core.weights.fingerprint import weights_fingerprint
from .host import ids, tensors
from .host.managed import (
    ManagedAnyStory,
    compute_dtype,
    fitting,
    load,
    number_type,
    release,
)
from .host.saying import say
from .host.texts import encode_label, encode_phrase


def clip_states(clip_vision: Any, pixels: Tensor, config: AnyStoryConfig) -> Tensor:
    """Penultimate states (V,S,W) of normalised pixels (V,3,S,S), past the host's own preprocessing
    (which rounds to 8 bits and crops). ModelMismatchError unless the encoder is the config's."""
    found = _clip_sizes(clip_vision)
    wanted = (config.clip.width, config.clip.layers, config.clip.image_size)
    if found != wanted:
        raise ModelMismatchError(
            f"clip_vision: got width, layers, picture size {found}, the AnyStory weights expect "
            f"{wanted}; load the CLIP vision model that they were trained with"
        )
    mm.load_model_gpu(clip_vision.patcher)
    out = clip_vision.model(pixel_values=pixels.to(clip_vision.load_device), intermediate_output=-2)
    return out[1].float()


def _clip_sizes(clip_vision: Any) -> tuple[int, int, int] | None:
    """(width, layers, picture size) of a CLIP vision tower; None for another kind of encoder."""
    tower = getattr(clip_vision.model, "vision_model", None)
    embeddings = getattr(tower, "embeddings", None)
    if embeddings is None or not hasattr(embeddings, "class_embedding"):
        return None
    layers = len(tower.encoder.layers)
    return embeddings.class_embedding.shape[-1], layers, clip_vision.image_size


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
                    "(SDXL: ViT-H/14).",
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
                    "MS-Diffusion, or with the original ReferenceNet): the clip of the model that "
                    "will sample.",
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
        model, config = anystory.model, anystory.model.config
        progress = comfy.utils.ProgressBar(3)
        views = prepare_views(image, mask, config, invert_mask=invert_mask, mask_shows=mask_shows)
        device = mm.get_torch_device()
        dtype = compute_dtype(device)
        with torch.inference_mode():
            clip_out = background = latents = label_out = phrase = None
            if "encoder" in anystory.patchers:
                clip_out = clip_states(clip_vision, views.clip, config).to(device, dtype)
                background = clip_states(clip_vision, zero_clip(config), config).to(device, dtype)
                grounding = config.clip_branch.grounding
                if grounding is not None and clip is not None and label.strip():
                    phrase = encode_phrase(clip, clean_label(label), grounding.phrase_dim)
                    phrase = phrase.to(device, dtype)
            progress.update(1)
            if model.reference_net is not None:
                pictures = tensors.vae_latents(vae, tensors.vae_picture(views.vae))
                latents = reference_latents(model, pictures.float()).to(device, dtype)
                if config.reference.cross_attention:
                    label_out = label_context(clip, label, config).to(device, dtype)
            states = PictureStates(
                clip=clip_out,
                background=background,
                latents=latents,
                label=label_out,
                phrase=phrase,
                clip_fingerprint=weights_fingerprint(clip_vision.model),
                number_types=number_types(clip_vision, vae, clip),
            )
            progress.update(1)
            subject = _encode(anystory, views, states, clean_label(label))
        progress.update(1)
        preview = ui.PreviewImage(tensors.uint8_picture(views.cutout), cls=cls).as_dict()
        preview["text"] = say(views.notes)
        return io.NodeOutput(subject, ui=preview)


def _encode(anystory: ManagedAnyStory, views: Views, states: PictureStates, label: str) -> Subject:
    """Encode with the modules on the load device, on as many pictures at a time as it holds."""
    device, config = mm.get_torch_device(), anystory.model.config
    patchers = anystory.having("encoder", "reference_net")
    one = 0
    if "reference_net" in anystory.patchers:
        one = reference_memory(config, compute_dtype(device))
    load(patchers, needed=one * views.clip.shape[0], least=one)
    try:
        return encode_subject(
            anystory.model,
            views,
            states,
            label=label,
            store=mm.unet_offload_device(),
            at_once=fitting(one, device),
        )
    finally:
        release(patchers)


def number_types(clip_vision: Any, vae: Any, clip: Any) -> dict[str, torch.dtype]:
    """What the host's networks compute in, by the inputs that they come from."""
    text = None if clip is None else number_type(clip.cond_stage_model)
    found = {
        "clip_vision": getattr(clip_vision, "dtype", None),
        "vae": getattr(vae, "vae_dtype", None),
        "clip": text,
    }
    return {name: kind for name, kind in found.items() if kind is not None}


def label_context(clip: Any, label: str, config: AnyStoryConfig) -> Tensor:
    """Text states (1,S,C) of the label, for a ReferenceNet with cross-attention."""
    if clip is None:
        raise ModelMismatchError(
            "clip: the ReferenceNet of these AnyStory weights reads the label's text; connect the "
            "clip of the model that will sample"
        )
    return encode_label(clip, label, config)[0][None]


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
        subject: Subject,
        strength: float,
        reference_strength: float,
        start: float,
        end: float,
        strength_at_start: float = 1.0,
        strength_at_end: float = 1.0,
        easing: str = "linear",
    ) -> io.NodeOutput:
        if not isinstance(subject, Subject):
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
