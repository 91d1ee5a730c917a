"""RoutingMapPreview: where each subject went, as a picture and as masks."""

from __future__ import annotations

import os
import secrets
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..anystory_core.errors import RoutingError
from ..anystory_core.pictures import figure as routing_figure
from ..anystory_core.pictures.atlas import build_atlas
from ..anystory_core.routing.record import RoutingRecord
from .host import ids, tensors
from .host.saying import say
from .host.sockets import RoutingMaps

LEAST_SHARE = 0.01  # a subject below it was hardly drawn


def choose_steps(text: str, count: int) -> list[int]:
    """'all', 'last', or 1-based numbers like '1, 5, 25' -> 0-based steps. Duplicates and numbers
    beyond the run's last step are dropped; RoutingError for anything else, or if none is left."""
    words = text.replace(",", " ").split()
    if words == ["all"]:
        return list(range(count))
    chosen: list[int] = []
    for word in words:
        step = count if word == "last" else int(word) if word.isdecimal() else 0
        if step < 1:
            raise RoutingError(
                f"steps: got {word!r}, expected 'all', 'last' or numbers from 1 to {count}"
            )
        if step <= count and step - 1 not in chosen:
            chosen.append(step - 1)
    if not chosen:
        raise RoutingError(
            f"steps: got {text!r}, but the run has {count} steps; expected 'all', 'last' or "
            f"numbers from 1 to {count}"
        )
    return chosen


def warnings_for(record: RoutingRecord, row: int) -> list[str]:
    """One sentence per subject that got almost nothing of the picture."""
    return [
        f"'{label}' got {100 * share:.1f} % of the picture: name it in the prompt, give it a mask, "
        "or try another seed."
        for label, share in zip(record.labels, record.shares(row), strict=False)
        if share < LEAST_SHARE
    ]


def viewer_data(record: RoutingRecord, row: int) -> dict[str, Any]:
    """What web/viewer.js shows for one batch row: ``file``, the atlas as a PNG in the host's temp
    folder, and ``layout``, how to read it (see :func:`~anystory_core.pictures.atlas.build_atlas`).
    """
    atlas = build_atlas(record, row)
    prefix = f"anystory_routes_{secrets.token_hex(4)}"  # a browser may keep an old file's name
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_temp_directory()
    )
    filename = f"{name}_{counter:05}_.png"
    with open(os.path.join(folder, filename), "wb") as file:
        file.write(atlas.png)
    place = {"filename": filename, "subfolder": subfolder, "type": "temp"}
    return {"file": place, "layout": atlas.layout}


def nothing_to_show(cls: Any, record: RoutingRecord, size: tuple[int, int]) -> io.NodeOutput:
    """A run without routes is no error: others of the same list may have some."""
    masks = torch.zeros(max(1, record.subjects), *size)
    black = torch.zeros(1, *size, 3)
    shown = ui.PreviewImage(black, cls=cls).as_dict()
    shown |= {"anystory_routes": [], "text": say([f"No routes. {_why(record)}"])}
    return io.NodeOutput(black, masks, ui=shown)


def _why(record: RoutingRecord) -> str:
    if record.idle:
        return (
            "No subject acted in this run: there is none, its strength is 0, or its window is "
            "empty."
        )
    if record.tiled:
        return "Another node drew the picture in tiles and does not say where each of them lies."
    if not record.steps:
        return "No step falls into the time range of the positive prompt."
    return (
        "No step falls between a subject's start and end, or another node changes the tokens of "
        "every block."
    )


class RoutingMapPreview(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return ids.schema(
            node_id="RoutingMapPreview",
            display_name="Routing Map Preview",
            category=ids.CATEGORY,
            description="Shows where each subject was routed in every block, over the steps, and "
            "gives one mask per subject.",
            is_output_node=True,
            inputs=[
                ids.Maps.Input("maps", tooltip="From Apply AnyStory."),
                io.Latent.Input(
                    "latent", tooltip="The sampler's result; it tells which run to show."
                ),
                io.String.Input(
                    "steps",
                    default="1, last",
                    tooltip="Which sampler steps to draw: 'all', 'last', or numbers like "
                    "'1, 5, last'. Masks always use all steps.",
                ),
                io.Int.Input(
                    "batch_index",
                    default=0,
                    min=0,
                    max=4095,
                    tooltip="Which picture of the latent batch, from 0.",
                ),
                io.Boolean.Input(
                    "show_background",
                    default=False,
                    tooltip="Add a row for the background, the complement of the subjects.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The decoded picture: adds the routes drawn over it to the preview.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="routes"),
                io.Mask.Output(display_name="masks"),
            ],
        )

    @classmethod
    @ids.named_errors
    def execute(
        cls,
        maps: RoutingMaps,
        latent: dict[str, Tensor],
        steps: str = "1, last",
        batch_index: int = 0,
        show_background: bool = False,
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        record = maps.find(latent["samples"])
        size = tuple(tensors.PIXELS_PER_LATENT * n for n in latent["samples"].shape[-2:])
        if not record.blocks:
            return nothing_to_show(cls, record, (size[0], size[1]))
        chosen = choose_steps(steps, len(record.steps))
        picture = routing_figure.figure(
            record, row=batch_index, steps=chosen, background=show_background
        )
        shown = ui.PreviewImage(picture[None], cls=cls).as_dict()
        viewer = viewer_data(record, batch_index)
        if image is not None:
            if not batch_index < image.shape[0]:
                raise RoutingError(
                    f"batch_index: got {batch_index}, the picture batch has {image.shape[0]}"
                )
            size = tuple(image.shape[1:3])
            plain = image[batch_index, ..., :3].cpu().float()
            over = routing_figure.overlay(record, plain, row=batch_index)
            shown["images"] += ui.PreviewImage(over[None], cls=cls).as_dict()["images"]
            viewer["picture"] = ui.PreviewImage(plain[None], cls=cls).as_dict()["images"][0]
        # Every key every time: the host joins the outputs of a list by the keys of the first.
        shown["anystory_routes"] = [viewer]
        shown["text"] = tuple(warnings_for(record, batch_index))
        masks = record.masks(batch_index, (size[0], size[1]))
        return io.NodeOutput(picture[None], masks.to(torch.float32), ui=shown)
