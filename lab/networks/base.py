"""The base: a U-Net of SDXL's topology, trained from scratch on the world's scenes (Eq. 1).

Latents and text states come from the cache. A base that begins here predicts v on SDXL's noise
schedule, shifted so that it ends in noise alone; one that was restored, what it did before
(:func:`write_prediction`). Timesteps are spread over a batch, and one caption in ten is dropped.
Three quarters of a batch also read references of its subjects (:mod:`.reading`), most of these
their CLIP tokens, too (:mod:`.clip_branch`): two thirds of them in places that are given, one third
where the hidden states themselves send them. Errors inside those subjects count more. In one step
of eight the tokens are there alone. Who reads where the hidden states say, and most of what reads
nothing, is asked where the subjects are (:mod:`.telling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from anystory_core.bases.sdxl.prediction import Kind, Prediction
from anystory_core.mini.config import CONFIG, PICTURE_SIZE
from anystory_core.subject.preprocess import mask_box, zero_clip
from anystory_core.training.hosts.folder import folder_prediction
from anystory_core.training.hosts.frozen import penultimate
from anystory_core.training.hosts.sizes import diffusers_unet_config
from anystory_core.training.hosts.unet import UNetInputs, attention_kernels, predict, time_ids
from anystory_core.training.losses import error_weights
from anystory_core.training.schedule import BETA_END, BETA_START, Schedule

from ..phase import Phase, accelerator, autocast, fast_in_half, first_makes, shares
from ..world.scenes import folder_of
from .cache import Cached, encode_texts, numbers_of, read_shard_of, read_shards
from .clip import load_clip
from .reading import Reader
from .row_sources import RowSources
from .telling import TaughtBase, describe

PREDICTION = Prediction("v", zero_snr=True)  # of a base that begins untrained
BATCH = 32
# Where CLIP tokens are there, they explain the colours first and leave the references little to do:
# on held-out pairs the reference branch alone lowered Eq. 1 by a tenth of what CLIP did.
DROP_CLIP = 0.25  # of what reads: share of rows without CLIP tokens
_DROP = 0.1
_PLAIN = 0.5  # share of captions that say only "an object"
# Shares of a batch: reading in given places; reading, of two subjects or more, where the answers
# about them send each; reading nothing. The last two are asked.
_PLACED, _SENT, _TOLD = 0.5, 0.25, 0.15
_TELLING = 0.3  # what being asked counts
# Every so many steps what reads has its tokens and no reference: taught beside references alone,
# the pictures with tokens and without were the same.
_TOKENS_ALONE = 8
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


def write_prediction(folder: Path, prediction: Prediction) -> None:
    """Keep beside a base what it predicts, and its noise schedule, as diffusers does:
    ``folder/scheduler``."""
    kind = "v_prediction" if prediction.kind == "v" else prediction.kind
    scheduler: Any = cast(Any, DDIMScheduler)(
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="linspace",  # as the evaluation draws
        prediction_type=kind,
        rescale_betas_zero_snr=prediction.zero_snr,
    )
    scheduler.save_pretrained(folder / "scheduler")


def spread_timesteps(batch: int, kind: Kind, generator: torch.Generator) -> Tensor:
    """(B,) int64 in [0,1000), one from each of B equal slices of u in [0,1], in random order: of
    1000 u where v is predicted, of 1000 (1 - u^2) where the noise is.

    Noisy ones more often then: what a subject looks like is decided there, where errors of the
    noise are small."""
    offset = torch.rand(batch, generator=generator)
    u = (torch.arange(batch) + offset) / batch
    share = u if kind == "v" else 1 - u.square()
    t = (share * 1000).long().clamp_max(999)
    return t[torch.randperm(batch, generator=generator)]


def level_weights(snr: Tensor, kind: Kind) -> Tensor:
    """What an error counts at signal-to-noise ratios (B): min(SNR + 1, 5) / (SNR + 1) of v,
    min(SNR, 5) / SNR of the noise (min-SNR, Hang et al. 2023).

    The error of the picture z_0 that v stands for is 1 / (SNR + 1) of v's own, so it counts once
    where there is only noise and five times where there is little. Min-SNR's weights of v
    (min(SNR, 5) / (SNR + 1)) leave the noisiest steps nothing, and outlines are decided there."""
    counted = snr + 1 if kind == "v" else snr
    return counted.clamp_max(_MOST_SNR) / counted


@dataclass(frozen=True)
class Picked:
    """Cached scenes, float32: latents (B,4,h,w), states (B,77,D), pooled (B,D). Of the first rows:
    subjects (n+m,N,h,w) where their N subjects are, zeros where there are fewer. The first n read
    reference latents (n,N,4,r,r) and, where shown (n,N) bool says so, tokens of CLIP states seen
    (n,N,S,W): the first of them where places (p,N,h,w) allow each, the others where answers send
    it. All but those p are asked by looks (n-p+m,N,2W). Places in [0,1]."""

    latents: Tensor
    states: Tensor
    pooled: Tensor
    subjects: Tensor
    references: Tensor
    seen: Tensor
    shown: Tensor
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
    shards: Sequence[Cached], count: int, empty: tuple[Tensor, Tensor], rng: np.random.Generator
) -> Picked:
    """``count`` random scenes in the shares of a batch, on the shards' device; ``empty`` is there,
    too."""
    placed = round(_PLACED * count)
    reading = placed + round(_SENT * count)
    with_subject = reading + round(_TOLD * count)
    rows: list[tuple[Tensor, ...]] = []
    subjects: list[Tensor] = []
    references: list[Tensor] = []
    seen: list[Tensor] = []
    shown: list[Tensor] = []
    places: list[Tensor] = []
    looks: list[Tensor] = []
    while len(rows) < count:
        shard = shards[int(rng.integers(len(shards)))]
        at, plain = int(rng.integers(len(shard.latents))), int(rng.random() < _PLAIN)
        number = len(rows)
        if number < with_subject:
            regions, there = shard.regions[at], shard.counts[at]
            if there < (2 if placed <= number < reading else 1):
                continue
            subjects.append(regions)
            if number < reading:
                references.append(shard.references[at])
                seen.append(shard.seen[at])
                with_tokens = rng.random() >= DROP_CLIP
                shown.append(regions.flatten(1).any(dim=1) & with_tokens)
            if number < placed:
                own = [reading_place(region, alone=there == 1, rng=rng) for region in regions]
                places.append(torch.stack(own))
            else:
                looks.append(describe(shard.seen[at].float()))
        text = shard.states[at, plain], shard.pooled[at, plain]
        rows.append((shard.latents[at], *(empty if rng.random() < _DROP else text)))
    device = shards[0].latents.device

    def joined(column: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(tuple(column)).to(device)
        return stacked.float() if stacked.is_floating_point() else stacked

    columns = (*zip(*rows, strict=True), subjects, references, seen, shown, places, looks)
    return Picked(*(joined(column) for column in columns))


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


def phase(folder: Path, steps: int) -> Phase:
    """How the base is trained, and where its state lies."""
    return Phase(
        name="base", folder=folder, steps=steps, learning_rate=8e-4, seed=3, ema=0.998,
        optimiser="muon", level=0.7,
    )  # fmt: skip


def load_base(folder: Path) -> TaughtBase:
    """Averaged weights, as far as the phase has come."""
    base = TaughtBase(build_unet(), CONFIG)
    phase(folder, 1).load(base)
    return base.requires_grad_(False)


def load_unet(folder: Path) -> Any:
    """The U-Net of :func:`load_base`."""
    return load_base(folder).unet


def train_base(folder: Path, *, steps: int, batch: int = BATCH, size: int = PICTURE_SIZE) -> None:
    """Train or resume on the cached shards of pictures of ``size``, where there is a CUDA device on
    that; more may be added meanwhile. ``batch``: scenes of a step, of all processes together.
    FileNotFoundError when there is no shard, ConfigError when the folder holds a base and does not
    say what it predicts."""
    cache, device = folder_of(folder, "cache", size), accelerator()
    shards = read_shards(cache, device)
    if not shards:
        raise FileNotFoundError(f"base: no shard in {cache}; run the phases world and cache first")
    if not phase(folder, steps).state_file.exists():
        said = folder / "scheduler" / "scheduler_config.json"
        first_makes(said, lambda: write_prediction(folder, PREDICTION))
    schedule = Schedule(folder_prediction(folder))
    kind = schedule.prediction.kind
    torch.manual_seed(3)
    clip, row_table = load_clip(folder)
    # Channels-last is faster in float32 (0.87 against 1.0 s per step of 32 on one thread) and
    # slower in bfloat16.
    base = TaughtBase(build_unet(), CONFIG).to(device)
    unet, teller = base.unet, base.teller
    reader = Reader(unet, CONFIG)
    teller.watch(unet, reader.sites)
    layout = torch.contiguous_format if fast_in_half(device) else torch.channels_last
    unet.to(memory_format=layout)
    states, pooled = encode_texts(clip.text, row_table, [""])
    empty = torch.from_numpy(states[0]).to(device), torch.from_numpy(pooled[0]).to(device)
    with torch.no_grad():
        zero = penultimate(clip.vision, zero_clip(CONFIG)).to(device)
    part, parts = shares()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        if step % _LOOK_AGAIN == 0:
            fresh = [number for number in numbers_of(cache) if number not in shards]
            shards.update({number: read_shard_of(cache, number, device) for number in fresh})
        count = batch // parts
        picked = pick(list(shards.values()), count, empty, np.random.default_rng((3, step, part)))
        t = spread_timesteps(count, kind, generator)
        noise = torch.randn(picked.latents.shape, generator=generator).to(device)
        reading, placed = len(picked.references), len(picked.places)
        noisy = schedule.noisy(picked.latents, noise, t).contiguous(memory_format=layout)
        ids = size_ids(count).to(device)
        inputs = UNetInputs(noisy, t.to(device), picked.states, picked.pooled, ids)
        with autocast(device), attention_kernels(device):
            sent = teller.routes(picked.looks[: reading - placed], picked.present[placed:reading])
            masks = RowSources.of_masks(picked.places)
            source = RowSources((*masks.parts, (reading - placed, sent)))
            present, alone = picked.present[:reading], step % _TOKENS_ALONE == 0
            tokens = base.clip.candidates(picked.seen, zero, present if alone else picked.shown)
            references = None if alone else picked.references
            call = reader.call(references, present, source, placed, tokens)
            predicted = predict(unet, reader.slot, call, inputs)
            asked = teller.loss(picked.told, picked.looks, picked.subjects[picked.told])
        target = schedule.target(picked.latents, noise, t)
        errors = picked.importance() * (predicted.float() - target).square()
        weights = level_weights(schedule.snr(t), kind).to(device)
        return (weights * errors.mean((1, 2, 3))).mean() + _TELLING * asked

    phase(folder, steps).run(base, loss_of)
