"""The base: a U-Net of SDXL's topology, trained from scratch on the world's scenes (Eq. 1).

Latents and text states come from the cache; the noise schedule is SDXL's. Losses are weighted by
min(SNR, 5) / SNR, timesteps are spread over a batch, noisy ones closer together, and one caption in
ten is dropped. More than half of a batch also reads references of its subjects (:mod:`.reading`),
one part of it in places that are given and one where the hidden states themselves send them, and
errors inside the subjects count more. The second part and most of what reads nothing is asked where
the subjects are (:mod:`.telling`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from anystory_core.mini.config import CONFIG, PICTURE_SIZE
from anystory_core.subject.preprocess import mask_box
from anystory_core.training.hosts.sizes import diffusers_unet_config
from anystory_core.training.hosts.unet import UNetInputs, attention_kernels, predict, time_ids
from anystory_core.training.losses import error_weights
from anystory_core.training.schedule import alphas_cumprod

from ..phase import Phase, autocast, half_is_faster, shares
from .cache import Cached, Half, encode_texts, read_shards
from .clip import load_clip
from .reading import Reader
from .row_sources import RowSources
from .telling import TaughtBase

BATCH = 32
_DROP = 0.1
_PLAIN = 0.5  # share of captions that say only "an object"
# Shares of a batch: reading in given places; reading, of two subjects or more, where the answers
# about them send each; reading nothing. The last two are asked.
_PLACED, _SENT, _TOLD = 0.25, 0.375, 0.25
_TELLING = 0.3  # what being asked counts
_EVERYWHERE = 0.5  # of one subject: share of scenes all of which may read, as in stage 1
# Share of the rest that reads inside the subject's outline; the others read in a box around it.
# Where only outlines read, an outline says what to draw, and a user's box is filled to its corners.
_OUTLINE = 0.25
_MOST_MARGIN = 4  # of a box, in latent pixels
_MOST_SNR = 5.0
_INSIDE = 3.0  # what errors inside a subject that is read count more; it covers 8 % of a picture
_LOOK_AGAIN = 500  # steps after which newly cached shards are taken up


def build_unet() -> Any:
    """diffusers' UNet2DConditionModel at the mini sizes, untrained."""
    return cast(Any, UNet2DConditionModel)(**diffusers_unet_config(CONFIG.unet))


def size_ids(batch: int) -> Tensor:
    """SDXL's size conditioning (B,6): original size, crop, target size; constant here."""
    return time_ids(PICTURE_SIZE, PICTURE_SIZE, batch, torch.device("cpu"))


def spread_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """(B,) int64 in [0,1000): t = (1 - u^2) 1000, u from each of B equal slices, in random order.

    Noisy ones more often: what a subject looks like is decided there, where errors are small."""
    offset = torch.rand(batch, generator=generator)
    u = (torch.arange(batch) + offset) / batch
    t = ((1 - u.square()) * 1000).long().clamp_max(999)
    return t[torch.randperm(batch, generator=generator)]


@dataclass(frozen=True)
class Picked:
    """Cached scenes, float32: latents (B,4,h,w), states (B,77,D), pooled (B,D). Of the first rows:
    subjects (n+m,N,h,w) where their N subjects are, zeros where there are fewer. The first n read
    reference latents (n,N,4,r,r): the first of them where places (p,N,h,w) allow each, the others
    where answers send it. All but those p are asked by looks (n-p+m,N,2W). Places in [0,1]."""

    latents: Tensor
    states: Tensor
    pooled: Tensor
    subjects: Tensor
    references: Tensor
    places: Tensor
    looks: Tensor

    @property
    def told(self) -> slice:
        """The rows that are asked."""
        return slice(len(self.places), len(self.subjects))

    @property
    def present(self) -> Tensor:
        """(n+m,N) bool: which subjects are there."""
        return self.subjects.flatten(2).amax(dim=2) > 0

    def importance(self) -> Tensor:
        """What an error counts, (B,1,h,w): more inside subjects that are read."""
        area = torch.zeros_like(self.latents[:, :1])
        reading = len(self.references)
        area[:reading, 0] = self.subjects[:reading].amax(dim=1)
        return error_weights(area, _INSIDE)


def pick(
    shards: list[Cached], count: int, empty: tuple[Tensor, Tensor], rng: np.random.Generator
) -> Picked:
    """``count`` random scenes in the shares of a batch."""
    placed = round(_PLACED * count)
    reading = placed + round(_SENT * count)
    with_subject = reading + round(_TOLD * count)
    rows: list[tuple[Tensor, ...]] = []
    subjects: list[Tensor] = []
    references: list[Tensor] = []
    places: list[Tensor] = []
    looks: list[Tensor] = []
    while len(rows) < count:
        shard = shards[rng.integers(len(shards))]
        at, plain = rng.integers(len(shard.latents)), int(rng.random() < _PLAIN)
        number = len(rows)
        if number < with_subject:
            regions = _tensor(shard.regions[at])
            there = int(regions.flatten(1).any(dim=1).sum())
            if there < (2 if placed <= number < reading else 1):
                continue
            subjects.append(regions)
            if number < reading:
                references.append(_tensor(shard.references[at]))
            if number < placed:
                own = [reading_place(region, alone=there == 1, rng=rng) for region in regions]
                places.append(torch.stack(own))
            else:
                looks.append(_tensor(shard.looks[at]))
        text = _tensor(shard.states[at, plain]), _tensor(shard.pooled[at, plain])
        rows.append((_tensor(shard.latents[at]), *(empty if rng.random() < _DROP else text)))
    columns = (*zip(*rows, strict=True), subjects, references, places, looks)
    return Picked(*(torch.stack(tuple(column)) for column in columns))


def reading_place(region: Tensor, *, alone: bool, rng: np.random.Generator) -> Tensor:
    """Where the subject of ``region`` (h,w) may be read, (h,w) in [0,1]: everywhere (only when it
    is ``alone``), in a loose box around it, or in the region itself; nowhere without a region."""
    if not region.any():
        return region
    if alone and rng.random() < _EVERYWHERE:
        return torch.ones_like(region)
    if rng.random() < _OUTLINE:
        return region
    top, bottom, left, right = mask_box(region > 0)
    above, below, before, after = rng.integers(0, _MOST_MARGIN + 1, 4).tolist()
    where = torch.zeros_like(region)
    where[max(0, top - above) : bottom + below, max(0, left - before) : right + after] = 1
    return where


def _tensor(half: Half) -> Tensor:
    return torch.from_numpy(half.copy()).float()


def phase(folder: Path, steps: int) -> Phase:
    """How the base is trained, and where its state lies."""
    return Phase(name="base", folder=folder, steps=steps, learning_rate=8e-4, seed=3, ema=0.998)


def load_unet(folder: Path) -> Any:
    """The U-Net with averaged weights, as far as the phase has come."""
    base = TaughtBase(build_unet(), CONFIG)
    phase(folder, 1).load(base)
    return base.unet.requires_grad_(False)


def train_base(folder: Path, *, steps: int) -> None:
    """Train or resume on the shards of ``folder/cache``; more may be added meanwhile.
    FileNotFoundError when there is none."""
    cache = folder / "cache"
    shards = read_shards(cache)
    if not shards:
        raise FileNotFoundError(f"base: no shard in {cache}; run the phases world and cache first")
    torch.manual_seed(3)
    clip, row_table = load_clip(folder)
    # Channels-last is faster in float32 (0.87 against 1.0 s per step of 32 on one thread) and
    # slower in bfloat16.
    base = TaughtBase(build_unet(), CONFIG)
    unet, teller = base.unet, base.teller
    reader = Reader(unet, CONFIG)
    teller.watch(unet, reader.sites)
    layout = torch.contiguous_format if half_is_faster() else torch.channels_last
    unet.to(memory_format=layout)
    states, pooled = encode_texts(clip.text, row_table, [""])
    empty = torch.from_numpy(states[0]).float(), torch.from_numpy(pooled[0]).float()
    signal = alphas_cumprod().float()
    part, parts = shares()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        if step % _LOOK_AGAIN == 0:
            shards[:] = read_shards(cache)
        count = BATCH // parts
        rng = np.random.default_rng((3, step, part))
        batch = pick(shards, count, empty, rng)
        t = spread_timesteps(count, generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        a = signal[t][:, None, None, None]
        reading, placed = len(batch.references), len(batch.places)
        noisy = a.sqrt() * batch.latents + (1 - a).sqrt() * noise
        with autocast(), attention_kernels(torch.device("cpu")):
            sent = teller.routes(batch.looks[: reading - placed], batch.present[placed:reading])
            masks = RowSources.of_masks(batch.places)
            source = RowSources((*masks.parts, (reading - placed, sent)))
            call = reader.call(batch.references, batch.present[:reading], source, placed)
            noisy = noisy.contiguous(memory_format=layout)
            inputs = UNetInputs(noisy, t, batch.states, batch.pooled, size_ids(count))
            predicted = predict(unet, reader.slot, call, inputs)
            asked = teller.loss(batch.told, batch.looks, batch.subjects[batch.told])
        snr = signal[t] / (1 - signal[t])
        weight = snr.clamp(max=_MOST_SNR) / snr
        errors = functional.mse_loss(predicted.float(), noise, reduction="none")
        removed = (weight * (batch.importance() * errors).mean((1, 2, 3))).mean()
        return removed + _TELLING * asked

    phase(folder, steps).run(base, loss_of)
