"""What the node AnyStorySegment finds in real held-out scenes, at its defaults.

Half of the noise, an empty prompt (zero states, as the node makes it), and the mean maps of one
noise or of several. The masks are compared with the true ones at picture resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from anystory_core.mini.config import CONFIG, TEXT
from anystory_core.routing.segment import mean_maps, noises
from anystory_core.weights.model import AnyStoryModel

from ..networks.text import LENGTH
from . import measures
from .bench import Answer
from .draw import SIDE, Encoder, Variant, prepare_tasks
from .passes import clean_latents, level_record, noised_pass
from .routing import Scenes
from .stack import Stack
from .tasks import Task

LEVEL = 500  # of 1000: the node's default noise, 0.5


def segmentation(
    model: AnyStoryModel, stack: Stack, tasks: Sequence[Task], count: int
) -> list[Answer]:
    """``count`` noises of each scene: IoU of the masks, and what perfect masks reach on the
    latent's grid. ValueError when the model holds no router."""
    drawn = torch.stack([noises((4, SIDE, SIDE), count, one.number) for one in tasks])
    found = maps_of(Encoder(stack, model), tasks, drawn)
    return [
        {
            "masks": measures.picture_iou(maps, one.masks()),
            "perfect masks": measures.mean_ceiling(one.masks(), (SIDE, SIDE)),
        }
        for one, maps in zip(tasks, found, strict=True)
    ]


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


SEGMENTED = (
    Scenes("segmentation: empty prompt, 4 noises", partial(segmentation, count=4)),  # the default
    Scenes("segmentation: empty prompt, 1 noise", partial(segmentation, count=1)),
)
