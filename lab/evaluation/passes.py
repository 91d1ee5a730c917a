"""Real scenes through the U-Net once: noised to a level, with injection on; and the maps of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from anystory_core.injection.prepare import PreparedSubjects
from anystory_core.routing.record import LevelRecord
from anystory_core.training.call import TrainingCall
from anystory_core.training.hosts.unet import UNetInputs, predict

from ..networks.base import size_ids
from ..networks.vae import to_signed
from ..phase import autocast
from ..world.emoji import Emoji
from .draw import Encoder, make_call
from .tasks import Task, task

BATCH = 20


def parts(numbers: range) -> list[range]:
    """``numbers``, :data:`BATCH` at a time."""
    return [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]


def batches(subjects: Sequence[Emoji], count: int, numbers: range) -> Iterator[list[Task]]:
    """The tasks of these ``numbers`` with ``count`` subjects, :data:`BATCH` at a time."""
    for part in parts(numbers):
        yield [task(subjects, count, n) for n in part]


def scenes_of(tasks: Sequence[Task]) -> Tensor:
    """The tasks' own pictures (B,3,H,W) in [-1,1]."""
    return to_signed(torch.stack([torch.from_numpy(t.scene.picture.copy()) for t in tasks]))


def clean_latents(encoder: Encoder, tasks: Sequence[Task]) -> Tensor:
    """The tasks' own pictures as latents (B,4,h,w)."""
    return encoder.stack.encode_pictures(scenes_of(tasks))


@torch.no_grad()
def noised_pass(
    encoder: Encoder,
    prepared: PreparedSubjects,
    clean: Tensor,
    noise: Tensor,
    level: int,
    text: tuple[Tensor, Tensor],
) -> TrainingCall:
    """One conditional pass over latents (B,4,h,w) noised to ``level`` of 1000; ``text`` is states
    (B,77,D) and pooled (B,D). The call holds the maps."""
    stack, count = encoder.stack, len(clean)
    times = torch.full((count,), level)
    call = make_call(prepared, encoder.model, count)
    with autocast():
        noisy = stack.schedule.noisy(clean, noise, times)
        inputs = UNetInputs(noisy, times, *text, size_ids(count))
        predict(stack.unet, stack.slot, call, inputs)
    return call


def level_record(call: TrainingCall, row: int) -> LevelRecord:
    """The maps of one row as the pack's nodes record them."""
    soft = call.soft_maps.items()
    return LevelRecord(
        sigma=0.0,
        active=(),
        grids={index: maps.grid for index, maps in soft},
        soft={index: maps.maps[row : row + 1].float() for index, maps in soft},
    )
