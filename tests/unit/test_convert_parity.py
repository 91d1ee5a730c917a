"""Converted weights do what the public method does, over a whole U-Net of SDXL's 70 blocks.

Decoupled cross-attention (IP-Adapter) is written here a second time, naively and in float64, from
the public file alone: its attention layers are numbered in the order in which diffusers names
them. The picture's tokens come from diffusers' own resampler.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anystory_core.injection.call import Call
from anystory_core.injection.prepare import Settings, prepare_subjects
from anystory_core.injection.rows import Rows
from anystory_core.routing.modes import build_source
from anystory_core.subject.subject import Subject
from anystory_core.training.hosts.unet import dense_attention, install
from anystory_core.weights.checkpoint import load_model
from anystory_core.weights.convert.conversion import convert
from anystory_core.weights.model import AnyStoryModel

from .public_weights import adapter_state, diffusers_unet, save, small_config

CONFIG = small_config((0, 2, 10), middle=10)
SCALE = 0.8
# float64 sums in another order, through 70 blocks
TOLERANCE = 1e-9


class Inputs:
    """A batch of one conditional and one unconditional row."""

    def __init__(self, seed: int) -> None:
        make = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        self.latents = random(2, 4, 16, 16)
        self.text = random(2, 7, CONFIG.unet.context_dim)
        self.added = {"text_embeds": random(2, 16), "time_ids": random(2, 6)}
        self.states = random(3, CONFIG.clip.tokens, CONFIG.clip.width)  # two pictures, then zero's

    def predict(self, unet: Any, **added: Any) -> Tensor:
        with torch.no_grad():
            conditions = {**self.added, **added}
            return unet(self.latents, 500, self.text, added_cond_kwargs=conditions).sample


@pytest.fixture(scope="module")
def unet() -> Any:
    return diffusers_unet(CONFIG).double()


@pytest.fixture(scope="module")
def adapter(unet: Any) -> dict[str, Tensor]:
    return adapter_state(list(unet.attn_processors), CONFIG)


@pytest.fixture(scope="module")
def public(unet: Any, adapter: dict[str, Tensor]) -> Any:
    """diffusers with the adapter loaded by its own code."""
    loaded = copy.deepcopy(unet)
    groups: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in adapter.items():
        group, rest = name.split(".", 1)
        groups[group][rest] = tensor.double()
    loaded._load_ip_adapter_weights([groups], low_cpu_mem_usage=False)
    for processor in loaded.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [SCALE]
    return loaded.double().eval()


def converted(tmp_path: Path, adapter: dict[str, Tensor]) -> AnyStoryModel:
    ip = save(tmp_path / "plus.safetensors", adapter)
    out = tmp_path / "converted.safetensors"
    options: dict[str, Any] = {"config": CONFIG, "reference_net": "none", "dtype": torch.float32}
    return load_model(convert(None, ip, out, **options).path, dtype=torch.float64)


def ours(
    unet: Any,
    model: AnyStoryModel,
    inputs: Inputs,
    count: int,
    mode: str,
    masks: Sequence[Tensor | None],
) -> Tensor:
    """Prediction with ``count`` subjects from the converted file; row 0 is conditional."""
    with torch.no_grad():
        tokens, _ = model.encoder(inputs.states)
    assert tokens is not None
    subjects = [
        Subject(
            label=f"subject {i}",
            tokens=tokens[i],
            features=(),
            routing=None,
            background_tokens=tokens[2],
            background_routing=None,
            cutout=torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
            fingerprint=model.fingerprint,
        )
        for i in range(count)
    ]
    with torch.no_grad():
        source = build_source(mode, model, subjects, masks)
        run = prepare_subjects(model, subjects, source, Settings(strength=SCALE))
    host = copy.deepcopy(unet)
    slot = install(host, model.sites)
    slot.call = Call(run, Rows((0,), (1,)), (True,) * count, model.sites, dense_attention)
    return inputs.predict(host)


Regions = Callable[[int], Tensor]  # number of tokens -> weights (2 rows, 3 candidates, Q)


class Naive:
    """One attention layer: text, plus for each picture its own attention under its region."""

    def __init__(
        self, number: int, adapter: dict[str, Tensor], tokens: Tensor, regions: Regions
    ) -> None:
        self.maps = tuple(
            adapter[f"ip_adapter.{number}.{member}_ip.weight"].double()
            for member in ("to_k", "to_v")
        )
        self.tokens = tokens  # (3,T,C): two pictures, then the zero picture
        self.regions = regions

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        q = attn.to_q(hidden_states)
        out = attend(q, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states), attn)
        weights = self.regions(q.shape[1])
        for i, tokens in enumerate(self.tokens):
            k, v = (tokens @ weight.T for weight in self.maps)
            term = attend(q, k.expand(2, -1, -1), v.expand(2, -1, -1), attn)
            out = out + SCALE * weights[:, i, :, None] * term
        return attn.to_out[0](out)


def attend(q: Tensor, k: Tensor, v: Tensor, attn: Any) -> Tensor:
    """Softmax(Q K^T / sqrt(d)) V, head by head."""
    size = q.shape[-1] // attn.heads
    heads: list[Tensor] = []
    for start in range(0, q.shape[-1], size):
        part = slice(start, start + size)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        heads.append(logits.softmax(dim=-1) @ v[..., part])
    return torch.cat(heads, dim=-1)


def naive(
    unet: Any, public: Any, adapter: dict[str, Tensor], inputs: Inputs, regions: Regions
) -> Tensor:
    with torch.no_grad():
        tokens = public.encoder_hid_proj.image_projection_layers[0](inputs.states)
    host = copy.deepcopy(unet)
    processors = dict(host.attn_processors)
    for number, name in enumerate(processors):
        if ".attn2." in name:
            processors[name] = Naive(number, adapter, tokens, regions)
    host.set_attn_processor(processors)
    return inputs.predict(host)


def everywhere(tokens: int) -> Tensor:
    """Row 0: the first picture at all tokens. Row 1: the zero picture."""
    weights = torch.zeros(2, 3, tokens, dtype=torch.float64)
    weights[0, 0] = 1
    weights[1, 2] = 1
    return weights


def difference(a: Tensor, b: Tensor) -> float:
    """Largest deviation, relative to the size of b."""
    return float((a - b).abs().max() / b.abs().max())


def test_one_subject_equals_the_public_method(tmp_path, unet, public, adapter, way) -> None:
    inputs = Inputs(10)
    model = converted(tmp_path, adapter)
    assert len(model.sites) == 70
    prediction = ours(unet, model, inputs, 1, "learned", [None])
    expected = naive(unet, public, adapter, inputs, everywhere)
    assert difference(prediction, expected) < TOLERANCE
    # diffusers itself: its embeddings are (rows, pictures, states, width) per adapter
    pictures = inputs.states[[0, 2]][:, None]
    theirs = inputs.predict(public, image_embeds=[pictures])
    assert difference(prediction, theirs) < TOLERANCE
    # and the adapter is no small thing here
    assert difference(inputs.predict(unet), expected) > 1e-3


def test_masks_equal_the_masked_sum(tmp_path, unet, public, adapter, way) -> None:
    """Two subjects in masks of 4x4 cells: each token gets one picture, the rest the zero one's."""
    inputs = Inputs(12)
    cells = torch.tensor(
        [[0, 0, 2, 1], [0, 2, 2, 1], [2, 2, 1, 1], [0, 2, 1, 2]]
    )  # subject 0, subject 1, background

    def regions(tokens: int) -> Tensor:
        side = math.isqrt(tokens)
        weights = torch.zeros(2, 3, side, side, dtype=torch.float64)
        for y in range(side):
            for x in range(side):
                weights[0, cells[y * 4 // side, x * 4 // side], y, x] = 1
        weights[1, 2] = 1
        return weights.flatten(2)

    masks = [
        (cells == i).double().repeat_interleave(16, 0).repeat_interleave(16, 1) for i in range(2)
    ]
    prediction = ours(unet, converted(tmp_path, adapter), inputs, 2, "masks", masks)
    expected = naive(unet, public, adapter, inputs, regions)
    assert difference(prediction, expected) < TOLERANCE


@pytest.mark.parametrize(
    "swap",
    [(121, 123), (49, 121)],
    ids=["neighbours in the middle", "up and middle"],
)
def test_permuted_weights_break_it(tmp_path, unet, public, adapter, swap) -> None:
    """Two blocks' weights exchanged in the file: far outside the tolerance above."""
    inputs = Inputs(13)
    permuted = dict(adapter)
    for member in ("to_k_ip", "to_v_ip"):
        a, b = (f"ip_adapter.{number}.{member}.weight" for number in swap)
        permuted[a], permuted[b] = adapter[b], adapter[a]
        assert adapter[a].shape == adapter[b].shape
    prediction = ours(unet, converted(tmp_path, permuted), inputs, 1, "learned", [None])
    expected = naive(unet, public, adapter, inputs, everywhere)
    assert difference(prediction, expected) > 1e3 * TOLERANCE
