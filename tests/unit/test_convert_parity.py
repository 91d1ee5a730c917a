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

from anystory_core.routing.modes import build_source
from anystory_core.weights.model import AnyStoryModel

from .decoupled import (
    CONFIG,
    TOLERANCE,
    Inputs,
    attend,
    attention_layers,
    converted,
    difference,
    ours,
    subject,
    with_processors,
)
from .public_weights import adapter_state, diffusers_unet, save, with_gates

SCALE = 0.8


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


def model_of(tmp_path: Path, adapter: dict[str, Tensor], **options: Any) -> AnyStoryModel:
    return converted(save(tmp_path / "plus.safetensors", adapter), **options)


def drawn(
    unet: Any,
    model: AnyStoryModel,
    inputs: Inputs,
    count: int,
    mode: str,
    masks: Sequence[Tensor | None],
    strength: float = SCALE,
) -> Tensor:
    """Prediction with ``count`` subjects from the converted file."""
    with torch.no_grad():
        tokens, _ = model.encoder(inputs.states)
    assert tokens is not None
    subjects = [subject(model, tokens=tokens[i], background_tokens=tokens[2]) for i in range(count)]
    source = build_source(mode, model, subjects, masks)
    return ours(unet, model, inputs, subjects, source, strength)


Regions = Callable[[int], Tensor]  # number of tokens -> weights (2 rows, 3 candidates, Q)


class Naive:
    """One attention layer: text, plus for each picture its own attention under its region, times
    MIP-Adapter's gate where the file has one."""

    def __init__(
        self,
        number: int,
        adapter: dict[str, Tensor],
        tokens: Tensor,
        regions: Regions,
        strength: float,
    ) -> None:
        self.maps = tuple(
            adapter[f"ip_adapter.{number}.{member}_ip.weight"].double()
            for member in ("to_k", "to_v")
        )
        self.tokens = tokens  # (3,T,C): two pictures, then the zero picture
        self.regions = regions
        self.strength = strength
        self.gate = adapter.get(f"ip_adapter.{number}.text_to_weight.weight")

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        q = attn.to_q(hidden_states)
        text = attend(q, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states), attn)
        out = text
        weights = self.regions(q.shape[1])
        for i, tokens in enumerate(self.tokens):
            k, v = (tokens @ weight.T for weight in self.maps)
            term = attend(q, k.expand(2, -1, -1), v.expand(2, -1, -1), attn)
            if self.gate is not None:
                open_ = 1 / (1 + torch.exp(-(text * self.gate.double()).sum(-1)))  # (B,Q)
                term = term * (open_ / open_.mean(dim=1, keepdim=True))[..., None]
            out = out + self.strength * weights[:, i, :, None] * term
        return attn.to_out[0](out)


def naive(
    unet: Any,
    public: Any,
    adapter: dict[str, Tensor],
    inputs: Inputs,
    regions: Regions,
    strength: float = SCALE,
) -> Tensor:
    with torch.no_grad():
        tokens = public.encoder_hid_proj.image_projection_layers[0](inputs.states)
    layers = attention_layers(unet)
    made = {n: Naive(n, adapter, tokens, regions, strength) for n in layers}
    return with_processors(unet, inputs, made)


def everywhere(tokens: int) -> Tensor:
    """Row 0: the first picture at all tokens. Row 1: the zero picture."""
    weights = torch.zeros(2, 3, tokens, dtype=torch.float64)
    weights[0, 0] = 1
    weights[1, 2] = 1
    return weights


def test_one_subject_equals_the_public_method(tmp_path, unet, public, adapter, way) -> None:
    inputs = Inputs(10)
    model = model_of(tmp_path, adapter)
    assert len(model.sites) == 70
    prediction = drawn(unet, model, inputs, 1, "learned", [None])
    expected = naive(unet, public, adapter, inputs, everywhere)
    assert difference(prediction, expected) < TOLERANCE
    # diffusers itself: its embeddings are (rows, pictures, states, width) per adapter
    pictures = inputs.states[[0, 2]][:, None]
    theirs = inputs.predict(public, image_embeds=[pictures])
    assert difference(prediction, theirs) < TOLERANCE
    # and the adapter is no small thing here
    assert difference(inputs.predict(unet), expected) > 1e-3


CELLS = torch.tensor([[0, 0, 2, 1], [0, 2, 2, 1], [2, 2, 1, 1], [0, 2, 1, 2]])  # 2: background
MASKS = [(i == CELLS).double().repeat_interleave(16, 0).repeat_interleave(16, 1) for i in range(2)]


def by_cells(tokens: int) -> Tensor:
    """Row 0: each token has the picture of its cell, or the zero one's. Row 1: the zero picture."""
    side = math.isqrt(tokens)
    weights = torch.zeros(2, 3, side, side, dtype=torch.float64)
    for y in range(side):
        for x in range(side):
            weights[0, CELLS[y * 4 // side, x * 4 // side], y, x] = 1
    weights[1, 2] = 1
    return weights.flatten(2)


def test_masks_equal_the_masked_sum(tmp_path, unet, public, adapter, way) -> None:
    """Two subjects in masks of 4x4 cells: each token gets one picture, the rest the zero one's."""
    inputs = Inputs(12)
    prediction = drawn(unet, model_of(tmp_path, adapter), inputs, 2, "masks", MASKS)
    expected = naive(unet, public, adapter, inputs, by_cells)
    assert difference(prediction, expected) < TOLERANCE


def test_mip_adapter_has_its_gate(tmp_path, unet, public, adapter, way) -> None:
    """By default; and without, it is IP-Adapter Plus at the strength of its authors."""
    inputs = Inputs(14)
    file = save(tmp_path / "mip.safetensors", with_gates(adapter))
    model = converted(file)
    assert model.config.clip_branch.gate and model.config.clip_branch.outside == "white"
    strength = 0.65 * SCALE
    prediction = drawn(unet, model, inputs, 2, "masks", MASKS)
    expected = naive(unet, public, with_gates(adapter), inputs, by_cells, strength)
    assert difference(prediction, expected) < TOLERANCE
    plain = drawn(unet, converted(file, gate=False), inputs, 2, "masks", MASKS)
    ungated = naive(unet, public, adapter, inputs, by_cells, strength)
    assert difference(plain, ungated) < TOLERANCE
    assert difference(plain, expected) > 1e-4  # the gate is no small thing here


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
    prediction = drawn(unet, model_of(tmp_path, permuted), inputs, 1, "learned", [None])
    expected = naive(unet, public, adapter, inputs, everywhere)
    assert difference(prediction, expected) > 1e3 * TOLERANCE
