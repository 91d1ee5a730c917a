"""RoutingMapPreview: where each subject went, as a picture and as masks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..anystory_core.errors import RoutingError
from ..anystory_core.pictures import figure as routing_figure
from ..anystory_core.pictures.atlas import build_atlas
from ..anystory_core.routing.record import LevelRecord, RoutingRecord
from .host import ids, tensors
from .host.saying import say
from .host.sockets import RoutingMaps

LEAST_SHARE = 0.01  # a subject below it was hardly drawn


def choose_levels(
    text: str, record: RoutingRecord, row: int
) -> tuple[list[LevelRecord], list[str]]:
    """'all', 'last', or numbers of steps from 1, like '1, 5, 25' -> the noise level at which each
    step was recorded for a batch row; and what is wrong with the text. 'last' is the last recorded
    one, and what is shown when nothing else is left. Numbers beyond the run's steps are dropped."""
    levels = record.levels_of(row)
    of_step: dict[int, LevelRecord] = {}
    for level in [*levels, *record.levels]:  # blank ones where there is nothing better
        of_step.setdefault(level.step, level)
    words = text.replace(",", " ").split()
    if words == ["all"]:
        return [of_step[step] for step in sorted(of_step)], []
    last = levels[-1].step
    known = [word for word in words if word == "last" or (word.isdecimal() and int(word) > 0)]
    steps = [last if word == "last" else int(word) - 1 for word in known]
    chosen = [of_step[step] for step in dict.fromkeys(steps) if step in of_step]
    notes: list[str] = []
    expected = f"expected 'all', 'last' or numbers from 1 to {record.steps}"
    if len(known) < len(words) or not words:
        notes.append(f"steps: got {text!r}, {expected}.")
    elif not chosen and all(step >= record.steps for step in steps):
        notes.append(f"steps: got {text!r}, but the run has {record.steps} steps; {expected}.")
    return chosen or [of_step[last]], notes


def missing_steps(record: RoutingRecord, row: int) -> list[int]:
    """Steps, from 0, at which some subject should act and no routes of a batch row are recorded."""
    seen = {level.step for level in record.levels if level.shows(row) or not any(level.active)}
    return [step for step in range(record.steps) if step not in seen]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending [3, 4, 5, 8] -> '3-5, 8'."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


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


def nothing_to_show(
    cls: Any, subjects: int, size: tuple[int, int], notes: Sequence[str]
) -> io.NodeOutput:
    """A black picture and empty masks. An error would take the prompt's other results away."""
    masks = torch.zeros(max(1, subjects), *size)
    black = torch.zeros(1, *size, 3)
    shown = ui.PreviewImage(black, cls=cls).as_dict()
    shown |= {"anystory_routes": [], "text": say(notes)}
    return io.NodeOutput(black, masks, ui=shown)


def why_nothing(record: RoutingRecord, row: int) -> str:
    """Why a batch row of a run has no routes at all."""
    if record.idle:
        return (
            "No subject acted in this run: there is none, its strength is 0, or its window is "
            "empty."
        )
    if record.tiled:
        return "Another node drew the picture in tiles and does not say where each of them lies."
    if not record.levels:
        return "No step falls into the time range of the positive prompt."
    if record.blocks:
        return f"Another node shows the model parts of the batch, none of which was picture {row}."
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
                    "'1, 5, last'; of many, as many as a figure holds. Masks use all steps.",
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
        samples = latent["samples"]
        if not isinstance(samples, Tensor) or samples.ndim != 4:
            shape = tuple(getattr(samples, "shape", ()))
            note = f"latent: got shape {shape}, expected (batch, channels, height, width)."
            return nothing_to_show(cls, 1, (64, 64), [note])
        notes: list[str] = []
        height, width = (tensors.PIXELS_PER_LATENT * n for n in samples.shape[-2:])
        picture = min(batch_index, samples.shape[0] - 1)
        if picture < batch_index:
            notes.append(
                f"batch_index: got {batch_index}, the latent batch has {samples.shape[0]}: picture "
                f"{picture} is shown."
            )
        found = maps.find(samples, picture)
        record, row = found.record, found.row
        if found.note:
            notes.append(found.note)
        if record is None:
            return nothing_to_show(cls, 1, (height, width), notes)
        if not any(level.shows(row) for level in record.levels):
            notes.append(f"No routes. {why_nothing(record, row)}")
            return nothing_to_show(cls, record.subjects, (height, width), notes)
        plain = None
        if image is not None:
            if picture < image.shape[0]:
                plain = image[picture, ..., :3].cpu().float().expand(-1, -1, 3)  # grey ones, too
                height, width = plain.shape[:2]
            else:
                notes.append(f"image: got a batch of {image.shape[0]}, without picture {picture}.")
        return show(
            cls, record, row, notes,
            steps=steps, background=show_background, plain=plain, size=(height, width),
        )  # fmt: skip


def show(
    cls: Any,
    record: RoutingRecord,
    row: int,
    notes: Sequence[str],
    *,
    steps: str,
    background: bool,
    plain: Tensor | None,
    size: tuple[int, int],
) -> io.NodeOutput:
    """The outputs for a batch row that has routes. ``plain``: its decoded picture (H,W,3) in [0,1];
    ``size``: of the masks; ``notes``: what there is to say so far."""
    chosen, wrong = choose_levels(steps, record, row)
    drawn = routing_figure.fitting(record, row=row, levels=chosen, background=background)
    figure = routing_figure.figure(record, row=row, levels=drawn, background=background)
    shown = ui.PreviewImage(figure[None], cls=cls).as_dict()
    notes = [*notes, *wrong]
    if len(drawn) < len(chosen):
        notes.append(
            f"The figure has {len(drawn)} of the {len(chosen)} steps that were chosen: more would "
            f"exceed {routing_figure.MOST_PIXELS // 2**20} megapixels. The viewer has them all."
        )
    missing = missing_steps(record, row)
    if missing:
        notes.append(
            f"No routes at step {ranges([step + 1 for step in missing])} of {record.steps}: the "
            "model was not called there with the positive prompt; a cache, the sampler or a time "
            "range left it out."
        )
    viewer: dict[str, Any] = {}
    try:
        viewer = viewer_data(record, row)
    except RoutingError as error:
        notes.append(f"No viewer. {error}.")
    if plain is not None:
        over = routing_figure.overlay(record, plain, row=row)
        shown["images"] += ui.PreviewImage(over[None], cls=cls).as_dict()["images"]
        viewer["picture"] = ui.PreviewImage(plain[None], cls=cls).as_dict()["images"][0]
    # Every key every time: the host joins the outputs of a list by the keys of the first.
    shown["anystory_routes"] = [viewer] if "file" in viewer else []
    shown["text"] = say([*notes, *warnings_for(record, row)])
    masks = record.masks(row, size)
    return io.NodeOutput(figure[None], masks.to(torch.float32), ui=shown)
