"""Decoupled cross-attention over a whole U-Net, in float64: what tests of public adapters share."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.injection.call import Call
from anystory_core.injection.prepare import Settings, prepare_subjects
from anystory_core.injection.rows import Rows
from anystory_core.routing.sources import RouteSource
from anystory_core.subject.subject import Subject
from anystory_core.training.hosts.unet import dense_attention, install
from anystory_core.weights.checkpoint import load_model
from anystory_core.weights.convert.conversion import convert
from anystory_core.weights.model import AnyStoryModel

from .public_weights import small_config

CONFIG = small_config((0, 2, 10), middle=10)
# float64 sums in another order, through 70 blocks
TOLERANCE = 1e-9


class Inputs:
    """A batch of one conditional and one unconditional row."""

    def __init__(self, seed: int, config: AnyStoryConfig = CONFIG) -> None:
        make = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        self.latents = random(2, 4, 16, 16)
        self.text = random(2, 7, config.unet.context_dim)
        self.added = {"text_embeds": random(2, 16), "time_ids": random(2, 6)}
        self.states = random(3, config.clip.tokens, config.clip.width)  # two pictures, then zero's

    def predict(self, unet: Any, **added: Any) -> Tensor:
        with torch.no_grad():
            conditions = {**self.added, **added}
            return unet(self.latents, 500, self.text, added_cond_kwargs=conditions).sample


def converted(file: Path, **options: Any) -> AnyStoryModel:
    """An adapter's file, converted alone, in float64."""
    out = file.with_name("converted.safetensors")
    options = {"config": CONFIG, "reference_net": "none", "dtype": torch.float32, **options}
    return load_model(convert(None, file, out, **options).path, dtype=torch.float64)


def subject(model: AnyStoryModel, **tensors: Any) -> Subject:
    """A subject with the given tensors and nothing else."""
    given: dict[str, Any] = {
        "label": "subject",
        "tokens": None,
        "features": (),
        "routing": None,
        "background_tokens": None,
        "background_routing": None,
        "cutout": torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        "fingerprint": model.fingerprint,
    }
    return Subject(**{**given, **tensors})


def ours(
    unet: Any,
    model: AnyStoryModel,
    inputs: Inputs,
    subjects: Sequence[Subject],
    source: RouteSource,
    strength: float,
) -> Tensor:
    """The U-Net's prediction with subjects; row 0 is conditional."""
    with torch.no_grad():
        run = prepare_subjects(model, subjects, source, Settings(strength=strength))
    host = copy.deepcopy(unet)
    slot = install(host, model.sites)
    active = (True,) * len(subjects)
    slot.call = Call(run, Rows((0,), (1,)), active, model.sites, dense_attention)
    return inputs.predict(host)


def idle(unet: Any, model: AnyStoryModel, inputs: Inputs) -> Tensor:
    """The plain prediction, through the same attention as :func:`ours`."""
    host = copy.deepcopy(unet)
    install(host, model.sites)
    return inputs.predict(host)


def with_processors(unet: Any, inputs: Inputs, made: Mapping[int, Any]) -> Tensor:
    """The prediction with other attention at the layers of these numbers, which is the order in
    which diffusers names them."""
    host = copy.deepcopy(unet)
    processors = dict(host.attn_processors)
    for number, name in enumerate(processors):
        if number in made:
            processors[name] = made[number]
    host.set_attn_processor(processors)
    return inputs.predict(host)


def attention_layers(unet: Any) -> list[int]:
    """Numbers of the layers of cross-attention."""
    return [n for n, name in enumerate(unet.attn_processors) if ".attn2." in name]


def attend(q: Tensor, k: Tensor, v: Tensor, attn: Any) -> Tensor:
    """Softmax(Q K^T / sqrt(d)) V, head by head."""
    size = q.shape[-1] // attn.heads
    heads: list[Tensor] = []
    for start in range(0, q.shape[-1], size):
        part = slice(start, start + size)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        heads.append(logits.softmax(dim=-1) @ v[..., part])
    return torch.cat(heads, dim=-1)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest deviation, relative to the size of b."""
    return float((a - b).abs().max() / b.abs().max())
