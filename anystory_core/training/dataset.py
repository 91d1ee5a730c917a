"""Samples -> batches of one row: what one training step sees, as a function of the sample's number
alone.

Which entry it is says :mod:`.order`; all randomness of a sample (its augmentation, what is dropped,
its noise) comes from (seed, p), so a run resumed at any step, or spread over any number of
processes, sees the same samples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..bases.sdxl.config import AnyStoryConfig
from ..data.index import Entry
from ..data.schema import Raw, decode, draw_views
from ..errors import AnyStoryError, DataError
from ..subject.preprocess import Views, cut_out, views_of
from .augment import augment, centre_crop
from .batches import Batch
from .config import TrainingConfig
from .order import Order
from .samples import Samples
from .shapes import Shape

_SEED_STRIDE = 1_000_003
_MOST_RETRIES = 20


def sample_seed(seed: int, number: int) -> int:
    """A seed for everything random about one sample."""
    return (seed * _SEED_STRIDE + number) % 2**62


class SampleDataset(Dataset[Batch]):
    """Entries as :class:`~.batches.Batch` of one row, by the number of the sample in the run, which
    has no end."""

    def __init__(
        self,
        samples: Samples,
        order: Order,
        config: TrainingConfig,
        model: AnyStoryConfig,
        *,
        shapes: Sequence[Shape] = (),
        plain: bool = False,
    ) -> None:
        """``shapes``: of each of the order's pools; squares by default. ``plain``: nothing is
        changed or dropped at random, as validation and sheets want it."""
        self.shapes = tuple(shapes)
        self.samples, self.order, self.config, self.model = samples, order, config, model
        self.subjects = 1 if config.stage == "subject" else config.data.max_subjects
        self.plain = plain

    def entry(self, number: int) -> Entry:
        """The entry that sample ``number`` starts from."""
        return self.samples[self.order.position(number)]

    def shape(self, number: int) -> Shape:
        """(height, width) of the target of sample ``number``."""
        side = self.config.data.resolution
        return self.shapes[self.order.pool(number)] if self.shapes else (side, side)

    def _views_of(self, entry: Entry, number: int) -> tuple[str, str] | None:
        """Which two views of a group sample ``number`` shows."""
        if entry.kind != "group":
            return None
        return draw_views(entry, random.Random(sample_seed(self.config.run.seed, ~number)))

    def __getitem__(self, number: int) -> Batch:
        bad: list[str] = []
        for offset in range(_MOST_RETRIES):
            entry = self.entry(number + offset)
            try:
                views = self._views_of(entry, number + offset)
                return self._prepare(decode(entry, views), number, tuple(bad))
            except AnyStoryError as error:
                text = str(error)
                bad.append(text if text.startswith(entry.key) else f"{entry.key}: {text}")
        raise DataError(f"data: {_MOST_RETRIES} corrupt samples in a row, the last: {bad[-1]}")

    def _prepare(self, raw: Raw, number: int, bad: tuple[str, ...]) -> Batch:
        config = self.config
        rng = random.Random(sample_seed(config.run.seed, number))
        target, masks, time_ids = centre_crop(raw.target, raw.masks, self.shape(number))
        crops: list[tuple[Tensor, Tensor]] = []
        if raw.reference is not None:
            crops.append(cut_out(raw.reference, raw.reference_mask))
            kept = masks
            if config.subject is not None and config.subject.inside and not len(masks):
                raise DataError(
                    f"{raw.key}: no target_mask.png, which subject.inside = "
                    f"{config.subject.inside:g} needs; add it or set subject.inside = 0"
                )
        else:
            order = sorted(range(len(masks)), key=lambda i: -float(masks[i].sum()))
            order = [i for i in order if bool((masks[i] > 0.5).any())][: config.data.max_subjects]
            rng.shuffle(order)
            order = order[: self.subjects]
            kept = masks[order]
            crops += [cut_out(raw.target, raw.masks[i]) for i in order]
            if config.stage == "subject" and not crops:
                raise DataError(f"{raw.key}: a scene without subjects cannot train stage 'subject'")
        if not self.plain:
            crops = [augment(*crop, config.augment, rng) for crop in crops]
        mirrored = not self.plain and config.data.mirror and rng.random() < 0.5
        stage = config.subject or config.router
        assert stage is not None
        drop_text = not self.plain and rng.random() < stage.drop_text
        drop_clip = False
        if config.subject is not None and not self.plain:
            drop_clip = rng.random() < config.subject.drop_clip
        views = self._views(crops)
        return Batch(
            numbers=(number,),
            keys=(raw.key,),
            captions=("" if drop_text else raw.caption,),
            target=(target.flip(-1) if mirrored else target)[None],
            time_ids=time_ids[None],
            masks=_pad(kept.flip(-1) if mirrored else kept, self.subjects)[None],
            clip=_pad(views.clip, self.subjects)[None],
            vae=_pad(views.vae, self.subjects)[None],
            reference_mask=_pad(views.mask, self.subjects)[None],
            present=(torch.arange(self.subjects) < len(crops))[None],
            drop_clip=torch.tensor([drop_clip]),
            bad=bad,
        )

    def _views(self, crops: list[tuple[Tensor, Tensor]]) -> Views:
        """The crops, ready for the encoders; views of nothing where there is none."""
        if crops:
            return views_of(crops, self.model)
        side, size = self.model.clip.image_size, self.model.reference.size
        clip, vae = torch.zeros(0, 3, side, side), torch.zeros(0, 3, size, size)
        return Views(clip, vae, vae[:, :1], torch.zeros(0, size, size, 3, dtype=torch.uint8))


def _pad(x: Tensor, count: int) -> Tensor:
    """(n,...) -> (count,...) with zeros."""
    return torch.cat((x, x.new_zeros(count - x.shape[0], *x.shape[1:]))) if len(x) < count else x
