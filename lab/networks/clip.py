"""The mini CLIP: a vision and a text transformer trained together, contrastively.

Three terms, all InfoNCE over one batch: cut-out of a subject against its name, scene against its
caption, and one view of a subject against another view of it (so that the states tell subjects
apart and not only their names). Patches are dropped at random: steps are several times cheaper.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from anystory_core.mini.config import VISION
from anystory_core.mini.weights import row_of_token

from ..phase import Phase, autocast, first_makes, shares
from ..world.emoji import Emoji
from ..world.scenes import SHARD, read_shard, shard_numbers
from ..world.views import SIZE, VIEWS, load_views, normalise
from .text import build_text, tokenize, vocabulary

SUBJECTS, SCENES = 28, 16  # of one batch
KEPT_PATCHES = 64
_WORD_DROP = 0.04
_NAME_FORMS = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image showing a {}")


class Clip(nn.Module):
    """Both towers and the temperature."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__()
        self.vision: Any = cast(Any, CLIPVisionModelWithProjection)(CLIPVisionConfig(**VISION))
        self.text: Any = build_text(ids)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_pictures(self, pixels: Tensor, keep: int | None, generator: Any = None) -> Tensor:
        """(B,3,224,224) -> unit vectors (B,D); ``keep`` random patches only, None = all."""
        vision = self.vision.vision_model
        x = vision.embeddings(pixels)  # (B,257,D)
        if keep is not None:
            noise = torch.rand(x.shape[0], x.shape[1] - 1, generator=generator)
            chosen = noise.argsort(dim=1)[:, :keep] + 1
            chosen = torch.cat((torch.zeros_like(chosen[:, :1]), chosen), dim=1)
            x = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
        x = vision.encoder(inputs_embeds=vision.pre_layrnorm(x)).last_hidden_state
        pooled = vision.post_layernorm(x[:, 0])
        return functional.normalize(self.vision.visual_projection(pooled).float(), dim=-1)

    def embed_texts(self, rows: Tensor) -> Tensor:
        """Rows (B,77) -> unit vectors (B,D). What follows the end token cannot matter, so the batch
        is cut behind its longest text."""
        length = int((rows != rows[0, -1]).sum(dim=1).max()) + 1
        return functional.normalize(
            self.text(input_ids=rows[:, :length]).text_embeds.float(), dim=-1
        )


def load_vocabulary(folder: Path) -> list[int]:
    """The token ids that have rows, as the phase wrote them."""
    return cast("list[int]", json.loads((folder / "vocabulary.json").read_text()))


def _keep_vocabulary(emoji: Sequence[Emoji], folder: Path) -> list[int]:
    """Write the vocabulary once: weights depend on it."""
    file = folder / "vocabulary.json"
    first_makes(file, lambda: file.write_text(json.dumps(vocabulary(emoji))))
    return load_vocabulary(folder)


def _relight(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Normalised cut-outs with changed contrast and one erased box each; ground stays zero."""
    count = pixels.shape[0]
    gain = 1 + 0.2 * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5)
    shift = 0.2 * torch.randn(count, 1, 1, 1, generator=generator)
    inside = (pixels.abs() > 0.02).any(dim=1, keepdim=True)
    pixels = pixels * gain + shift * inside
    for row in range(count):
        w, h, x, y = cast("list[float]", torch.rand(4, generator=generator).tolist())
        width, height = int(SIZE * 0.35 * w), int(SIZE * 0.35 * h)
        left, top = int(x * (SIZE - width)), int(y * (SIZE - height))
        pixels[row, :, top : top + height, left : left + width] = 0
    return pixels


def _contrast(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of matching rows."""
    logits = scale * a @ b.t()
    target = torch.arange(a.shape[0])
    forth = functional.cross_entropy(logits, target)
    return (forth + functional.cross_entropy(logits.t(), target)) / 2


def phase(folder: Path) -> Phase:
    """How the mini CLIP is trained, and where its state lies."""
    return Phase(
        name="clip",
        folder=folder,
        steps=500,
        learning_rate=1e-3,
        seed=2,
        weight_decay=0.05,
        ema=0.99,
    )


def load_clip(folder: Path) -> tuple[Clip, Tensor]:
    """Both towers as the phase left them, and the row of each token."""
    ids = load_vocabulary(folder)
    clip = Clip(ids)
    phase(folder).load(clip)
    return clip.requires_grad_(False), row_of_token(ids)


def train_clip(emoji: list[Emoji], folder: Path) -> None:
    """Train or resume; needs the world's shards."""
    torch.manual_seed(2)
    ids = _keep_vocabulary(emoji, folder)
    row_table = row_of_token(ids)
    clip = Clip(ids)
    views = load_views(emoji, folder / "views.npy")
    families: dict[str, list[int]] = {}
    for index, item in enumerate(emoji):
        families.setdefault(item.family, []).append(index)
    groups = list(families.values())
    scenes = folder / "scenes"
    shards = [read_shard(scenes, number) for number in shard_numbers(scenes)]

    part, parts = shares()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(step * parts + part)
        chosen = [rng.choice(group) for group in rng.sample(groups, SUBJECTS)]
        pairs = [rng.sample(range(VIEWS), 2) for _ in chosen]
        cut = np.stack([views[i, p[k]] for k in (0, 1) for i, p in zip(chosen, pairs, strict=True)])
        cut_outs = _relight(normalise(torch.from_numpy(cut)), generator)
        texts = [rng.choice(_NAME_FORMS).format(emoji[i].name) for i in chosen]
        pictures: list[Any] = []
        for _ in range(SCENES):
            shard, at = rng.choice(shards), rng.randrange(SHARD)
            pictures.append(shard.pictures[at])
            texts.append(shard.captions[at])
        full = normalise(torch.from_numpy(np.stack(pictures)))
        full = functional.interpolate(full, size=(SIZE, SIZE), mode="area")
        rows = row_table[tokenize(texts)]
        dropped = torch.rand(rows.shape, generator=generator) < _WORD_DROP
        special = (rows == row_table[49406]) | (rows == row_table[49407])
        rows = rows.masked_fill(dropped & ~special, 0)
        with autocast():
            seen = clip.embed_pictures(torch.cat((cut_outs, full)), KEPT_PATCHES, generator)
            said = clip.embed_texts(rows)
        first, second, whole = seen.split((SUBJECTS, SUBJECTS, SCENES))
        scale = clip.scale.exp().clamp(max=100)
        named = _contrast(torch.cat((first, whole)), said, scale)
        return named + _contrast(first, second, scale)

    phase(folder).run(clip, loss_of)
