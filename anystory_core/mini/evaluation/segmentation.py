"""What the node AnyStorySegment finds in real held-out scenes, at its defaults.

Half of the noise, an empty prompt (zero states, as the node makes it), and the mean maps of one
noise or of several. The masks are compared with the true ones at picture resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...build import AnyStoryModel
from ...routing_maps import StepRecord
from ...segment import mean_maps, noises
from ...training import diffusers_unet
from ...training.bases import alphas_cumprod
from ..base import size_ids
from ..config import CONFIG, TEXT
from ..emoji import Emoji
from ..phase import autocast
from ..text import LENGTH
from ..vae import to_signed
from . import measures
from .draw import SIDE, Encoder, Variant, make_call, make_run
from .stack import Stack
from .tasks import Task, task

LEVEL = 500  # of 1000: the node's default noise, 0.5
# Row of the table -> noises that are averaged; the first is the node's default.
ROWS = {
    "segmentation: empty prompt, 4 noises": 4,
    "segmentation: empty prompt, 1 noise": 1,
}
_BATCH = 20


def measure_segmentation(
    model: AnyStoryModel, stack: Stack, subjects: Sequence[Emoji], samples: int, count: int
) -> dict[str, measures.Estimate]:
    """Scenes of two and three subjects, ``count`` noises each: IoU of the masks, and what perfect
    masks reach on the latent's grid. ValueError when the model holds no router."""
    found: list[float] = []
    ceilings: list[float] = []
    encoder = Encoder(stack, model)
    for number in (2, 3):
        tasks = [task(subjects, number, n) for n in range(samples // 2)]
        for start in range(0, len(tasks), _BATCH):
            batch = tasks[start : start + _BATCH]
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
    stack, model, rows = encoder.stack, encoder.model, len(tasks)
    pictures = torch.stack([torch.from_numpy(t.scene.picture.copy()) for t in tasks])
    clean = stack.encode_pictures(to_signed(pictures))
    states = torch.zeros(rows, LENGTH, CONFIG.unet.context_dim)
    pooled = torch.zeros(rows, TEXT["hidden_size"])
    run = make_run(Variant(model, "router"), encoder, tasks)
    alpha = alphas_cumprod().float()[LEVEL]
    total: list[Tensor] = [torch.zeros(run.subjects + 1, SIDE, SIDE) for _ in tasks]
    for one in noise.unbind(dim=1):
        call = make_call(run, model, rows)
        with autocast():
            diffusers_unet.predict(
                stack.unet, stack.slot, call, alpha.sqrt() * clean + (1 - alpha).sqrt() * one,
                torch.full((rows,), LEVEL), states, pooled, size_ids(rows),
            )  # fmt: skip
        grids = {index: soft.grid for index, soft in call.soft_maps.items()}
        for row in range(rows):
            soft = {i: maps.maps[row : row + 1].float() for i, maps in call.soft_maps.items()}
            step = StepRecord(sigma=0.0, active=(), grids=grids, soft=soft)
            total[row] += mean_maps(step, (SIDE, SIDE)) / noise.shape[1]
    return total
