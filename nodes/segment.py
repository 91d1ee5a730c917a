"""AnyStorySegment: where the subjects are in a picture that exists already."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..anystory_core.errors import RoutingError
from ..anystory_core.injection.prepare import Settings
from ..anystory_core.routing import segment
from ..anystory_core.routing.masks import check_batch, mask_of
from .apply import apply_routing, is_applied
from .bases import base_of
from .host import ids, tensors
from .host.base import Kept
from .host.sockets import Routing, RoutingMaps

_AT_ONCE = 4  # noises in one pass of the U-Net


def encode_picture(vae: Any, picture: Tensor) -> Tensor:
    """Latent (1,4,h,w) of a picture (H,W,3) in [0,1], scaled to whole latent pixels."""
    height, width = (
        max(1, round(n / tensors.PIXELS_PER_LATENT)) * tensors.PIXELS_PER_LATENT
        for n in picture.shape[:2]
    )
    pixels = picture[None, ..., :3].movedim(-1, 1).float()
    if (height, width) != tuple(picture.shape[:2]):
        pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear")
    return tensors.vae_latents(vae, pixels.movedim(1, -1))


def soft_maps(
    model: Any,
    routing: Routing,
    positive: Any,
    latent: Tensor,
    noise: Tensor,
    level: float,
    kept: Kept | None = None,
) -> Tensor:
    """Mean soft map (N+1,h,w) of one routed pass over ``latent`` (1,4,h,w) at a noise level in
    (0,1], with every noise of ``noise`` (R,4,h,w) as a row. ``kept``: is shared by the passes."""
    maps = RoutingMaps(keep_soft=True)
    # Agreement looks for a place for every subject; here the picture says whether it has one.
    alone = dataclasses.replace(routing, agree=False)
    patched = apply_routing(model, alone, Settings(), 0.0, 1.0, maps, bar=False, kept=kept)
    sampling = patched.get_model_object("model_sampling")
    # The host's noise level at 0 % is a number beyond all of the model's.
    sigma = min(float(sampling.percent_to_sigma(1 - level)), float(sampling.sigma_max))
    comfy.sample.sample_custom(
        patched,
        noise,
        1.0,
        comfy.samplers.sampler_object("euler"),
        torch.tensor([sigma, 0.0]),
        positive,
        positive,
        latent.repeat(noise.shape[0], 1, 1, 1),
        disable_pbar=True,
    )
    record = maps.runs[-1].record
    if record.idle:
        raise RoutingError(
            "routing: no subject acts (strength 0, or a time window that is empty); raise its "
            "strength in AnyStory Subject Options"
        )
    if record.tiled:
        raise RoutingError(
            "model: another node draws its pictures in tiles; connect the model from before it"
        )
    if not record.levels:
        raise RoutingError(
            f"positive: none of its prompts is used at noise {level}; raise or lower noise, or "
            "connect a prompt without a time range"
        )
    return segment.mean_maps(record.levels[0], (latent.shape[-2], latent.shape[-1]))


class AnyStorySegment(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return ids.schema(
            node_id="AnyStorySegment",
            display_name="AnyStory Segment",
            category=ids.CATEGORY,
            description="Finds the subjects in a picture that exists already: the picture is "
            "noised, the model looks at it once, and the routes become masks.",
            inputs=[
                io.Model.Input("model", tooltip="The model, before any Apply AnyStory."),
                io.Vae.Input("vae", tooltip="The VAE of that model."),
                io.Image.Input(
                    "image", tooltip="The picture to look at; every picture of a batch in turn."
                ),
                ids.Routing.Input(
                    "routing",
                    tooltip="From Subject Router, in a mode that is learned or reads the text.",
                ),
                io.Float.Input(
                    "noise",
                    default=0.5,
                    min=0.02,
                    max=1.0,
                    step=0.01,
                    tooltip="How far the picture is noised, from 0 (clean) to 1 (noise only). "
                    "Less keeps small subjects, more looks at the whole.",
                ),
                io.Int.Input(
                    "noises",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Number of different noises whose maps are averaged. More is steadier "
                    "and takes longer.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the first noise.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="A prompt that describes the picture. Without it an empty one is used.",
                ),
            ],
            outputs=[io.Mask.Output(display_name="masks")],
        )

    @classmethod
    @ids.named_errors
    def execute(
        cls,
        model: Any,
        vae: Any,
        image: Tensor,
        routing: Routing,
        noise: float = 0.5,
        noises: int = 4,
        seed: int = 0,
        positive: Any = None,
    ) -> io.NodeOutput:
        anystory = routing.anystory
        base = base_of(anystory)
        base.check_segmentation(anystory)
        check_mode(routing)
        if is_applied(model):
            raise RoutingError(
                "model: it already went through an ApplyAnyStory; connect the model from before it"
            )
        if positive is None:
            positive = base.empty_conditioning(anystory)
        passes = [min(_AT_ONCE, noises - i) for i in range(0, noises, _AT_ONCE)]
        if routing.mode.endswith("masks"):
            check_batch(routing.masks, image.shape[0])
        kept = Kept()
        progress = comfy.utils.ProgressBar(image.shape[0] * (len(passes) + 1))
        masks: list[Tensor] = []
        for number, picture in enumerate(image):
            own = of_picture(routing, number)
            latent = encode_picture(vae, picture)
            progress.update(1)
            drawn = segment.noises(latent.shape[1:], noises, seed)
            total: Tensor | None = None
            for part in drawn.split(passes[0]):
                maps = soft_maps(model, own, positive, latent, part, noise, kept)
                maps = maps * part.shape[0]
                total = maps if total is None else total + maps
                progress.update(1)
            assert total is not None  # noises >= 1
            size = picture.shape[0], picture.shape[1]
            masks.append(segment.masks_of(total / noises, size))
        return io.NodeOutput(torch.cat(masks))


def of_picture(routing: Routing, number: int) -> Routing:
    """The routing with the masks of one picture alone."""
    masks = (None if mask is None else mask_of(mask, number) for mask in routing.masks)
    return dataclasses.replace(routing, masks=tuple(masks))


def check_mode(routing: Routing) -> None:
    """RoutingError unless the routes come from what the picture shows."""
    if not routing.subjects:
        raise RoutingError("routing: it has no subject; connect at least one to Subject Router")
    if routing.mode == "masks":
        raise RoutingError(
            "routing: mode 'masks' would only give your own masks back; choose 'learned' or 'text'"
        )
    if not routing.mode.startswith("text") and routing.anystory.model.routers is None:
        raise RoutingError(
            "routing: these AnyStory weights hold no router; load weights with a router, or choose "
            "the mode 'text' in Subject Router"
        )
