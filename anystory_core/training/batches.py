"""Samples -> batches: what one training step sees, as a function of the sample's number alone.

Sample number p is entry ``permutation(seed, p // n)[p % n]``. All randomness of a sample (its
augmentation, what is dropped, its noise) comes from (seed, p), so a run resumed at any step, or
spread over any number of processes, sees the same samples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..bases.sdxl.config import AnyStoryConfig
from ..data.index import Entry, Index
from ..data.parts import Kind
from ..data.schema import Raw, decode, draw_views
from ..errors import AnyStoryError, DataError
from ..subject.preprocess import Views, cut_out, views_of
from .config import AugmentSettings, TrainingConfig

_SEED_STRIDE = 1_000_003
_MOST_RETRIES = 20


def sample_seed(seed: int, number: int) -> int:
    """A seed for everything random about one sample."""
    return (seed * _SEED_STRIDE + number) % 2**62


@dataclass(frozen=True)
class Sample:
    """One sample as tensors. N subjects, padded to the run's most; see :class:`Batch`."""

    number: int
    key: str
    caption: str
    target: Tensor
    time_ids: Tensor
    masks: Tensor
    clip: Tensor
    vae: Tensor
    reference_mask: Tensor
    present: Tensor
    drop_clip: bool
    bad: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """B samples.

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
    def of(cls, samples: Sequence[Sample]) -> Batch:
        """Stack samples."""

        def stack(name: str) -> Tensor:
            return torch.stack([getattr(s, name) for s in samples])

        return cls(
            tuple(s.number for s in samples),
            tuple(s.key for s in samples),
            tuple(s.caption for s in samples),
            stack("target"),
            stack("time_ids"),
            stack("masks"),
            stack("clip"),
            stack("vae"),
            stack("reference_mask"),
            stack("present"),
            torch.tensor([s.drop_clip for s in samples]),
            tuple(bad for s in samples for bad in s.bad),
        )


def augment(
    picture: Tensor, mask: Tensor, settings: AugmentSettings, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Rotate, crop, pad with zeros, flip and recolour a square crop (1,3,s,s), (1,1,s,s).

    The subject is cut out first, so that padding and cropping move it against its frame."""
    import kornia.enhance as enhance
    import kornia.geometry.transform as geometry

    both = torch.cat((picture * mask, mask), dim=1)
    if rng.random() < settings.rotate:
        angle = torch.tensor([rng.uniform(-settings.degrees, settings.degrees)])
        both = cast(Any, geometry.rotate)(both, angle, mode="bilinear", padding_mode="zeros")
    if rng.random() < settings.crop:
        side = both.shape[-1]
        kept = max(1, round(side * rng.uniform(settings.least_kept, 1)))
        y, x = rng.randint(0, side - kept), rng.randint(0, side - kept)
        cropped = both[..., y : y + kept, x : x + kept]
        both = cropped if bool((cropped[:, 3:] > 0.5).any()) else both
    if rng.random() < settings.pad:
        edge = round(both.shape[-1] * rng.uniform(0, settings.most_padding))
        left, top = rng.randint(0, edge), rng.randint(0, edge)
        both = torch.nn.functional.pad(both, (left, edge - left, top, edge - top))
    if rng.random() < settings.flip:
        both = both.flip(-1)
    mask = both[:, 3:]
    picture = torch.where(mask > 0.01, both[:, :3] / mask.clamp_min(0.01), 0.0).clamp(0, 1)
    if rng.random() < settings.colour:
        amount = settings.colour_amount
        picture = cast(Any, enhance.adjust_brightness)(picture, rng.uniform(-amount, amount))
        picture = cast(Any, enhance.adjust_saturation)(picture, 1 + rng.uniform(-amount, amount))
        picture = picture.clamp(0, 1)
    return picture, mask


class SampleDataset(Dataset[Sample]):
    """Entry number -> :class:`Sample`. Indexed by the global sample number, without an end."""

    def __init__(self, index: Index, config: TrainingConfig, model: AnyStoryConfig) -> None:
        subject = config.stage == "subject"
        kinds: tuple[Kind, ...] = ("pair", "group", "scene") if subject else ("scene",)
        if not len(index.of_kinds(kinds, whole=True)):
            raise DataError(
                f"data: stage {config.stage!r} needs samples of kind {' or '.join(kinds)}, found "
                f"none among {len(index)}; see docs/data.md"
            )
        self.index = index
        # Those that lack a file stay: :func:`decode` says so, and they are counted as corrupt.
        self._positions = index.of_kinds(kinds)
        self.config = config
        self.model = model
        self.subjects = 1 if config.stage == "subject" else config.data.max_subjects
        self._epoch = -1
        self._order = self._positions

    def __len__(self) -> int:
        return len(self._positions)

    def entry(self, number: int) -> Entry:
        """The entry that sample ``number`` starts from."""
        epoch, place = divmod(number, len(self))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.config.run.seed * _SEED_STRIDE + epoch)
            order: Any = torch.randperm(len(self), generator=generator)
            self._order, self._epoch = self._positions[order.numpy()], epoch
        return self.index[int(self._order[place])]

    def _drawn(self, number: int) -> tuple[Entry, tuple[str, str] | None]:
        """The entry of a sample, and of a group which two views it shows."""
        entry = self.entry(number)
        if entry.kind != "group":
            return entry, None
        return entry, draw_views(entry, random.Random(sample_seed(self.config.run.seed, ~number)))

    def __getitem__(self, number: int) -> Sample:
        bad: list[str] = []
        for offset in range(_MOST_RETRIES):
            try:
                raw = decode(*self._drawn(number + offset))
                return self._prepare(raw, number, tuple(bad))
            except AnyStoryError as error:
                bad.append(str(error))
        raise DataError(f"data: {_MOST_RETRIES} corrupt samples in a row, the last: {bad[-1]}")

    def _prepare(self, raw: Raw, number: int, bad: tuple[str, ...]) -> Sample:
        config = self.config
        rng = random.Random(sample_seed(config.run.seed, number))
        target, masks, time_ids = centre_square(raw.target, raw.masks, config.data.resolution)
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
        crops = [augment(*crop, config.augment, rng) for crop in crops]
        mirrored = config.data.mirror and rng.random() < 0.5
        stage = config.subject or config.router
        assert stage is not None
        drop_text = rng.random() < stage.drop_text
        drop_clip = config.subject is not None and rng.random() < config.subject.drop_clip
        views = views_of(crops, self.model) if crops else None
        return Sample(
            number,
            raw.key,
            "" if drop_text else raw.caption,
            target.flip(-1) if mirrored else target,
            time_ids,
            _pad(kept.flip(-1) if mirrored else kept, self.subjects),
            *self._padded(views),
            present=torch.arange(self.subjects) < len(crops),
            drop_clip=drop_clip,
            bad=bad,
        )

    def _padded(self, views: Views | None) -> tuple[Tensor, Tensor, Tensor]:
        """clip, vae and mask of the subjects, zeros for the absent ones."""
        side, size = self.model.clip.image_size, self.model.reference.size
        if views is None:
            return (
                torch.zeros(self.subjects, 3, side, side),
                torch.zeros(self.subjects, 3, size, size),
                torch.zeros(self.subjects, 1, size, size),
            )
        return tuple(_pad(x, self.subjects) for x in (views.clip, views.vae, views.mask))  # type: ignore[return-value]


def _pad(x: Tensor, count: int) -> Tensor:
    """(n,...) -> (count,...) with zeros."""
    return torch.cat((x, x.new_zeros(count - x.shape[0], *x.shape[1:]))) if len(x) < count else x


def centre_square(picture: Tensor, masks: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale the shorter side to ``size`` and crop the centre: (H,W,3) in [0,1], (N,H,W) ->
    (3,size,size) in [-1,1], (N,size,size), time_ids (6) as :class:`Batch` has them."""
    height, width = picture.shape[:2]
    scale = size / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    x = picture.movedim(-1, 0)[None]
    if target != (height, width):
        x = torch.nn.functional.interpolate(
            x, size=target, mode="bicubic", align_corners=False, antialias=True
        ).clamp(0, 1)
        if len(masks):
            masks = torch.nn.functional.interpolate(masks[None], size=target, mode="area")[0]
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    x = x[0, :, top : top + size, left : left + size]
    masks = masks[:, top : top + size, left : left + size]
    time_ids = torch.tensor([height, width, top, left, size, size], dtype=torch.float32)
    return 2 * x - 1, masks if len(masks) else masks.new_zeros(0, size, size), time_ids


class _Numbers(torch.utils.data.Sampler[list[int]]):
    """Sample numbers of every batch of one process, from a step on."""

    def __init__(self, config: TrainingConfig, first: int, rank: int, world: int) -> None:
        self.config, self.first, self.rank, self.world = config, first, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        run = self.config.run
        for micro in range(self.first * run.accumulate, run.steps * run.accumulate):
            start = (micro * self.world + self.rank) * run.batch
            yield list(range(start, start + run.batch))


def load_batches(
    dataset: SampleDataset, config: TrainingConfig, *, first_step: int, rank: int, world: int
) -> Iterator[Batch]:
    """All batches of one process from ``first_step`` to the end of the run, read ahead by
    ``data.workers`` processes."""
    workers = config.data.workers
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=_Numbers(config, first_step, rank, world),
        collate_fn=Batch.of,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        persistent_workers=False,
    )
    return iter(cast("Iterator[Batch]", loader))
