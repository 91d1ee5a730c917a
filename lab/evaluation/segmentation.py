"""What the node AnyStorySegment finds in real held-out scenes, at its defaults.

Half of the noise, an empty prompt (zero states, as the node makes it), and the mean maps of one
noise or of several. The masks are compared with the true ones at picture resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anystory_core.mini.config import CONFIG, TEXT
from anystory_core.routing.segment import mean_maps, noises
from anystory_core.weights.model import AnyStoryModel

from ..networks.text import LENGTH
from ..world.emoji import Emoji
from . import measures
from .draw import SIDE, Encoder, Variant, prepare_tasks
from .passes import batches, clean_latents, half_of, level_record, noised_pass
from .stack import Stack
from .tasks import Task

LEVEL = 500  # of 1000: the node's default noise, 0.5
# Row of the table -> noises that are averaged; the first is the node's default.
ROWS = {
    "segmentation: empty prompt, 4 noises": 4,
    "segmentation: empty prompt, 1 noise": 1,
}


def measure_segmentation(
    model: AnyStoryModel, stack: Stack, subjects: Sequence[Emoji], numbers: range, count: int
) -> dict[str, measures.Estimate]:
    """Scenes of two and three subjects, ``count`` noises each: IoU of the masks, and what perfect
    masks reach on the latent's grid. ValueError when the model holds no router."""
    found: list[float] = []
    ceilings: list[float] = []
    encoder = Encoder(stack, model)
    for subject_count in (2, 3):
        for batch in batches(subjects, subject_count, half_of(numbers)):
            drawn = [noises((4, SIDE, SIDE), count, one.number) for one in batch]
            for one, maps in zip(batch, maps_of(encoder, batch, torch.stack(drawn)), strict=True):
                found.append(measures.picture_iou(maps, one.masks()))
                ceilings.append(measures.mean_ceiling(one.masks(), (SIDE, SIDE)))
    return {
        "masks": measures.bootstrap(found),
        "perfect masks": measures.bootstrap(ceilings),
    }


@torch.no_grad()
def maps_of(encoder: Encoder, tasks: Sequence[Task], noise: Tensor) -> list[Tensor]:
    """Mean soft maps (N+1,h,w) of each of B scenes over the noises (B,R,4,h,w) of its row."""
    rows, clean = len(tasks), clean_latents(encoder, tasks)
    empty = (
        torch.zeros(rows, LENGTH, CONFIG.unet.context_dim),
        torch.zeros(rows, TEXT["hidden_size"]),
    )
    prepared = prepare_tasks(Variant(encoder.model, "router", agree=False), encoder, tasks)
    total = [torch.zeros(prepared.subjects + 1, SIDE, SIDE) for _ in tasks]
    for one in noise.unbind(dim=1):
        call = noised_pass(encoder, prepared, clean, one, LEVEL, empty)
        for row in range(rows):
            total[row] += mean_maps(level_record(call, row), (SIDE, SIDE)) / noise.shape[1]
    return total
