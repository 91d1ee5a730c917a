"""What one training step sees, and how processes share it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import TrainingConfig
from .ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples of N subjects each, padded to the run's most.

    target (B,3,H,W) in [-1,1]; time_ids (B,6), SDXL's size conditioning: (height, width) of the
    picture before it was scaled, (top, left) of the crop, (height, width) of the target, without
    which enlarged pictures and cut-off heads are learned as what whole ones look like; masks
    (B,N,H,W) in [0,1]; clip (B,N,3,S,S) and vae (B,N,3,R,R) as
    :class:`~..subject.preprocess.Views`; reference_mask (B,N,1,R,R); present (B,N) bool;
    drop_clip (B) bool: the CLIP condition becomes the background's; bad: errors of samples that
    were replaced by their neighbours."""

    numbers: tuple[int, ...]
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    target: Tensor
    time_ids: Tensor
    masks: Tensor
    clip: Tensor
    vae: Tensor
    reference_mask: Tensor
    present: Tensor
    drop_clip: Tensor
    bad: tuple[str, ...]

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """The rows of all, in order."""

        def joined(values: Sequence[Any]) -> Any:
            if isinstance(values[0], Tensor):
                return torch.cat(list(values))
            return tuple(chain.from_iterable(values))

        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: joined([getattr(b, name) for b in batches]) for name in fields})

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; the loader calls it."""
        return self._map(lambda x: x.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on ``device``."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {n: change(x) for n, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **tensors)


class _Numbers(Sampler[list[int]]):
    """Sample numbers of every batch of one process, from a step on."""

    def __init__(self, config: TrainingConfig, ranks: Ranks, first: int) -> None:
        self.config, self.ranks, self.first = config, ranks, first

    def __iter__(self) -> Iterator[list[int]]:
        run, ranks = self.config.run, self.ranks
        for micro in range(self.first * run.accumulate, run.steps * run.accumulate):
            start = (micro * ranks.count + ranks.index) * run.batch
            yield list(range(start, start + run.batch))


def load_batches(
    dataset: Dataset[Batch], config: TrainingConfig, ranks: Ranks, *, first_step: int
) -> Iterator[Batch]:
    """All batches of this process from ``first_step`` to the end of the run, read ahead by
    ``data.workers`` processes."""
    workers = config.data.workers
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=_Numbers(config, ranks, first_step),
        collate_fn=Batch.join,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        persistent_workers=False,
        pin_memory=ranks.device.type == "cuda",  # such an accelerator copies from it meanwhile
    )
    return iter(cast("Iterator[Batch]", loader))
