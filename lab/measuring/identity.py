"""The measuring instrument for identity: a small network that tells subjects apart by their looks.

Trained for this alone, on the training families only, so that it knows the held-out subjects no
better than any others: normalised softmax with a margin over all training emoji. It is never used
by the model. A subject of a picture is named by the nearest of the candidates' mean embeddings over
real renders (:func:`gallery`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from ..phase import Phase, autocast, shares
from ..world.emoji import Emoji
from ..world.render import UInt8, solid_box, transformed
from ..world.scenes import SHARD, read_shard, shard_numbers
from ..world.views import load_rendered

SIZE = 64  # side of the crops that the network sees
WIDTH = 128
CUTS = 12  # rendered cut-outs of each subject
_ROOM = 80  # cut-outs are kept at this side and cropped to SIZE
BATCH = 64
_SCALE, _MARGIN = 24.0, 0.15


class Identity(nn.Module):
    """(B,3,64,64) in [-1,1], the subject filling most of it -> unit vectors (B,128)."""

    def __init__(self) -> None:
        super().__init__()

        def unit(wide: int, out: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(wide, out, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())

        # Measured, one thread, 64 crops forth and back: 0.07 s; 0.23 with a full-size first layer.
        self.trunk = nn.Sequential(
            unit(3, 32, 2), unit(32, 64, 2), unit(64, 64, 1), unit(64, 128, 2), unit(128, 128, 1),
            unit(128, 256, 2), unit(256, 256, 1),
        )  # fmt: skip
        self.head = nn.Linear(256 * 4, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(self.trunk(pixels), 2)
        return functional.normalize(self.head(x.flatten(1)).float(), dim=-1)


class _Trained(nn.Module):
    """The network and one direction per training subject."""

    def __init__(self, subjects: int) -> None:
        super().__init__()
        self.network = Identity()
        self.directions = nn.Parameter(torch.randn(subjects, WIDTH) * 0.1)


def render_cut(emoji: Emoji, rng: random.Random) -> UInt8:
    """RGBA (80,80,4): the subject turned, flipped, relit, of varied sharpness, its box centred."""
    sprite, _ = transformed(emoji, rng, round(rng.uniform(60, 180)))
    sprite = sprite.crop(solid_box(sprite))
    side = max(sprite.size)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(sprite, ((side - sprite.width) // 2, (side - sprite.height) // 2))
    inner = round(SIZE * rng.uniform(0.86, 1.0))
    out = Image.new("RGBA", (_ROOM, _ROOM))
    corner = (_ROOM - inner) // 2
    out.paste(canvas.resize((inner, inner), Image.Resampling.BILINEAR), (corner, corner))
    return np.asarray(out)


def load_cuts(emoji: Sequence[Emoji], file: Path) -> UInt8:
    """(len(emoji), CUTS, 80, 80, 4), mapped from disk, rendered first when missing."""

    def cut(i: int, number: int) -> UInt8:
        return render_cut(emoji[i], random.Random(900_000 + i * CUTS + number))

    return load_rendered(file, (len(emoji), CUTS, _ROOM, _ROOM, 4), cut)


def place_cut(cut: UInt8, picture: UInt8, rng: random.Random) -> UInt8:
    """A cut-out over a part of a scene, cropped to (64,64,3) a few pixels off its box."""
    y, x = rng.randrange(picture.shape[0] - SIZE), rng.randrange(picture.shape[1] - SIZE)
    dy, dx = (rng.randint(5, _ROOM - SIZE - 5) for _ in range(2))
    piece = cut[dy : dy + SIZE, dx : dx + SIZE].astype(np.float32)
    ground = picture[y : y + SIZE, x : x + SIZE].astype(np.float32)
    alpha = piece[..., 3:] / 255
    return (piece[..., :3] * alpha + ground * (1 - alpha)).astype(np.uint8)


def soften(pixels: Tensor, generator: torch.Generator, sides: tuple[int, int] = (24, 60)) -> Tensor:
    """Half of the batch at a lower resolution (a side from the first to below the second of
    ``sides``) and back, as generated pictures are softer."""
    count = pixels.shape[0] // 2
    side = int(torch.randint(*sides, (1,), generator=generator))
    low = functional.interpolate(pixels[:count], size=(side, side), mode="area")
    back = functional.interpolate(low, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat((back, pixels[count:]))


def phase(folder: Path) -> Phase:
    """How the network is trained, and where its state lies."""
    return Phase(
        name="identity", folder=folder, steps=8000, learning_rate=2e-3, seed=6, weight_decay=0.02,
        ema=0.998,
    )  # fmt: skip


def load_identity(folder: Path) -> Identity:
    """The network as the phase left it."""
    state = phase(folder).final()
    trained = _Trained(len(state["directions"]))
    trained.load_state_dict(state)
    return trained.network.eval().requires_grad_(False)


def train_identity(emoji: list[Emoji], folder: Path) -> None:
    """Train or resume; FileNotFoundError without the world's shards."""
    scenes = folder / "scenes"
    shards = [read_shard(scenes, number) for number in shard_numbers(scenes)]
    if not shards:
        raise FileNotFoundError(f"identity: no shard in {scenes}; run the phase world first")
    torch.manual_seed(6)
    trained = _Trained(len(emoji))
    cuts = load_cuts(emoji, folder / "cuts.npy")
    part, parts = shares()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(7_000_000 + step * parts + part)
        chosen = [rng.randrange(len(emoji)) for _ in range(BATCH // parts)]
        pictures: list[UInt8] = []
        for index in chosen:
            ground = rng.choice(shards).pictures[rng.randrange(SHARD)]
            pictures.append(place_cut(cuts[index, rng.randrange(CUTS)], ground, rng))
        pixels = torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 127.5 - 1
        pixels[::2] = pixels[::2].flip(-1)  # a flipped subject is the same one
        pixels = soften(pixels, generator)
        with autocast():
            seen = trained.network(pixels)
        cosine = seen @ functional.normalize(trained.directions, dim=-1).t()
        target = torch.tensor(chosen)
        margin = _MARGIN * functional.one_hot(target, len(emoji))
        return functional.cross_entropy(_SCALE * (cosine - margin), target)

    phase(folder).run(trained, loss_of)


@torch.no_grad()
def gallery(
    network: Callable[[Tensor], Tensor],
    emoji: Sequence[Emoji],
    grounds: Sequence[UInt8],
    renders: int,
    seed: int,
) -> Tensor:
    """Mean unit vectors (len(emoji),D) of ``network``'s, (P,D) of crops (P,3,64,64), over real
    renders."""

    def crop(item: Emoji, rng: random.Random) -> UInt8:
        return place_cut(render_cut(item, rng), grounds[rng.randrange(len(grounds))], rng)

    return mean_vectors(network, emoji, crop, renders, seed)


def mean_vectors(
    network: Callable[[Tensor], Tensor],
    emoji: Sequence[Emoji],
    crop: Callable[[Emoji, random.Random], UInt8],
    renders: int,
    seed: int,
) -> Tensor:
    """Unit vectors (len(emoji),D): the mean of ``network``'s over so many crops (s,s,3) of each."""
    rows: list[Tensor] = []
    for number, item in enumerate(emoji):
        rng = random.Random(seed + number)
        crops = [crop(item, rng) for _ in range(renders)]
        pixels = torch.from_numpy(np.stack(crops)).movedim(-1, 1).float() / 127.5 - 1
        rows.append(network(pixels).mean(dim=0))
    return functional.normalize(torch.stack(rows), dim=-1)
