"""MS-Diffusion's queries and its attention, against float64 transcriptions of both."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.config import GroundingConfig, QFormerConfig
from anystory_core.errors import CheckpointError, RoutingError
from anystory_core.routing.modes import build_source
from anystory_core.subject.encoder import PictureStates, encode_subject
from anystory_core.subject.files import load_subject, save_subject
from anystory_core.subject.grounding import Box, GroundedQFormer, check_phrases, ground_subjects
from anystory_core.subject.preprocess import CLIP_MEAN, CLIP_STD, prepare_views, views_of
from anystory_core.training.initial import with_ip_adapter_sizes
from anystory_core.weights.checkpoint import load_model
from anystory_core.weights.convert.adapters import BIG_G, Adapter
from anystory_core.weights.convert.plan import plan_tensors

from .decoupled import (
    TOLERANCE,
    Inputs,
    attend,
    attention_layers,
    converted,
    difference,
    idle,
    ours,
    subject,
    with_processors,
)
from .public_weights import (
    diffusers_unet,
    ms_diffusion_state,
    save,
    save_pickle,
    small_config,
)

CONFIG = small_config((0, 1, 2))
PHRASE = 6
STRENGTH = 0.6


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    out = x @ state[f"{name}.weight"].T
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def naive_queries(state: dict[str, Tensor], phrase: Tensor, box: tuple[float, ...]) -> Tensor:
    """Written from the public file's names: frequency, then sine and cosine, then the number."""
    numbers = []
    for k in range(8):
        for wave in (math.sin, math.cos):
            for number in box:
                numbers.append(wave(100 ** (k / 8) * number))
    u = torch.cat((phrase, torch.tensor(numbers, dtype=torch.float64)))
    hidden = gelu(linear(u, state, "image_proj.latent_proj.0"))
    width = state["image_proj.latent_norm.weight"].shape[0]
    latents = linear(hidden, state, "image_proj.latent_proj.2").reshape(-1, width)
    return norm(latents, state, "image_proj.latent_norm")


def naive_tokens(state: dict[str, Tensor], states: Tensor, latents: Tensor, heads: int) -> Tensor:
    """The tokens of one picture: states (S,W), latents (T,width) -> (T,output)."""
    x = linear(states, state, "image_proj.proj_in")
    layer = 0
    while f"image_proj.layers.{layer}.0.to_q.weight" in state:
        path = f"image_proj.layers.{layer}"
        queries = norm(latents, state, f"{path}.0.norm2")
        keys = torch.cat((norm(x, state, f"{path}.0.norm1"), queries))
        q = linear(queries, state, f"{path}.0.to_q")
        k, v = linear(keys, state, f"{path}.0.to_kv").chunk(2, dim=-1)
        size = q.shape[-1] // heads
        parts = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            weights = (q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(dim=-1)
            parts.append(weights @ v[:, part])
        latents = latents + linear(torch.cat(parts, dim=-1), state, f"{path}.0.to_out")
        hidden = norm(latents, state, f"{path}.1.0")
        hidden = gelu(linear(hidden, state, f"{path}.1.1"))
        latents = latents + linear(hidden, state, f"{path}.1.3")
        layer += 1
    latents = norm(latents, state, "image_proj.attention_norm")
    return norm(linear(latents, state, "image_proj.proj_out"), state, "image_proj.norm_out")


@pytest.fixture(scope="module")
def unet() -> Any:
    return diffusers_unet(CONFIG).double()


@pytest.fixture(scope="module")
def state(unet: Any) -> dict[str, Tensor]:
    return ms_diffusion_state(list(unet.attn_processors), CONFIG, phrase=PHRASE)


@pytest.fixture(scope="module")
def wide(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in state.items()}


@pytest.fixture
def model(tmp_path, state) -> Any:
    return converted(save(tmp_path / "ms_adapter.safetensors", state), config=CONFIG)


# The third has no size; no two have a place in common.
BOXES = [
    (0.0, 0.0, 0.5, 0.75),
    (0.5, 0.25, 1.0, 0.75),
    (0.25, 0.0, 0.25, 0.0),
    (0.0, 0.75, 0.5, 1.0),
]


@pytest.mark.parametrize("box", [None, *BOXES])
def test_tokens_equal_the_transcription(model, wide, box) -> None:
    """Dropped (the learned queries), and grounded in boxes, one of no size; two pictures."""
    encoder = model.encoder.subject
    assert isinstance(encoder, GroundedQFormer)
    make = torch.Generator().manual_seed(5)
    states = torch.randn(2, 7, CONFIG.clip.width, generator=make, dtype=torch.float64)
    phrase = torch.randn(PHRASE, generator=make, dtype=torch.float64)
    with torch.no_grad():
        got = encoder(states) if box is None else encoder.grounded(states, phrase, Box(*box))
    if box is None:
        latents = wide["image_proj.grounding_latents"][0]
    else:
        latents = naive_queries(wide, phrase, box)
    for view in range(2):
        expected = naive_tokens(wide, states[view], latents, encoder_heads(model))
        assert difference(got[view], expected) < 1e-12


def encoder_heads(model: Any) -> int:
    return model.config.subject_qformer.heads


def cells_of(box: tuple[float, ...], side: int) -> Tensor:
    """Tokens inside a box whose borders are those of tokens: (side*side,) in row order."""
    inside = torch.zeros(side, side)
    for y in range(side):
        for x in range(side):
            inside[y, x] = float(
                box[0] <= (x + 0.5) / side < box[2] and box[1] <= (y + 0.5) / side < box[3]
            )
    return inside.flatten()


class Naive:
    """Text, plus a softmax over the tokens of the box that a place is in; nothing elsewhere, and
    nothing in the unconditional row."""

    def __init__(
        self, number: int, wide: dict[str, Tensor], tokens: list[Tensor], boxes: list[Any]
    ) -> None:
        self.k, self.v = (wide[f"ms_adapter.{number}.to_{m}_ip.weight"] for m in "kv")
        self.tokens, self.boxes = tokens, boxes

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        q = attn.to_q(hidden_states)
        out = attend(q, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states), attn)
        for tokens, box in zip(self.tokens, self.boxes, strict=True):
            inside = cells_of(box, math.isqrt(q.shape[1])).double()
            term = attend(q[:1], (tokens @ self.k.T)[None], (tokens @ self.v.T)[None], attn)
            out[:1] = out[:1] + STRENGTH * inside[:, None] * term
        return attn.to_out[0](out)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_attention_equals_the_transcription(unet, model, wide, count, way) -> None:
    """N subjects in boxes on a 4x4 grid; the last box may have no size. The
    unconditional row is the plain U-Net's, to the last bit."""
    inputs = Inputs(30 + count, CONFIG)
    phrases = torch.randn(count, PHRASE, dtype=torch.float64)
    states = torch.randn(count, 1, 7, CONFIG.clip.width, dtype=torch.float64)
    subjects, masks, tokens = [], [], []
    for i in range(count):
        box = BOXES[i]
        mask = cells_of(box, 16).reshape(16, 16)
        masks.append(mask)
        around = Box.around(mask)
        is_sized = bool(mask.any())
        assert dataclasses.astuple(around) == (box if is_sized else (0, 0, 0, 0))
        subjects.append(subject(model, states=states[i], phrase=phrases[i]))
        latents = naive_queries(wide, phrases[i], dataclasses.astuple(around))
        tokens.append(naive_tokens(wide, states[i, 0], latents, encoder_heads(model)))
    placed = ground_subjects(model, "masks", subjects, masks)
    source = build_source("masks", model, placed, masks)
    prediction = ours(unet, model, inputs, placed, source, 1.0)
    made = {n: Naive(n, wide, tokens, BOXES[:count]) for n in attention_layers(unet)}
    expected = with_processors(unet, inputs, made)
    assert difference(prediction, expected) < TOLERANCE
    plain = idle(unet, model, inputs)
    assert difference(plain[:1], expected[:1]) > 1e-3
    assert torch.equal(prediction[1:], plain[1:])


def test_several_pictures_are_tokens_side_by_side(model, wide) -> None:
    make = torch.Generator().manual_seed(8)
    states = torch.randn(3, 7, CONFIG.clip.width, generator=make, dtype=torch.float64)
    phrase = torch.randn(PHRASE, generator=make, dtype=torch.float64)
    mask = torch.zeros(8, 8)
    mask[2:6, :4] = 1
    (placed,) = ground_subjects(
        model, "text within masks", [subject(model, states=states, phrase=phrase)], [mask]
    )
    latents = naive_queries(wide, phrase, (0.0, 0.25, 0.5, 0.75))
    expected = [naive_tokens(wide, x, latents, encoder_heads(model)) for x in states]
    assert placed.tokens is not None
    assert difference(placed.tokens, torch.cat(expected)) < 1e-12


def test_modes_without_masks_have_the_learned_queries(model) -> None:
    given = subject(model, tokens=torch.zeros(1, 48), states=torch.zeros(1, 7, 40))
    for mode in ("text", "learned"):
        assert ground_subjects(model, mode, [given], [None]) == [given]
        check_phrases(mode, [given])


def test_a_label_is_missing(model) -> None:
    named = subject(model, states=torch.zeros(1, 7, 40), phrase=torch.zeros(PHRASE))
    unnamed = subject(model, states=torch.zeros(1, 7, 40))
    for mode in ("masks", "text within masks"):
        check_phrases(mode, [named])
        with pytest.raises(RoutingError, match=r"subject \[2\] has none; give its Encode Subject"):
            check_phrases(mode, [named, unnamed])
    check_phrases("masks", [subject(model, tokens=torch.zeros(1, 48))])  # weights without


@pytest.mark.parametrize(
    "box", [(-0.1, 0, 1, 1), (0, 0, 1.1, 1), (0.6, 0, 0.4, 1), (0, 1, 1, 0.5), (0, 0, 1, 1.1)]
)
def test_boxes_outside_are_refused(box) -> None:
    with pytest.raises(RoutingError, match="reaches out of the picture"):
        Box(*box)


def test_the_file_and_its_dummy_tokens(tmp_path, state) -> None:
    """The very layout, as a pickle; the dummy tokens reach nothing."""
    one = converted(save_pickle(tmp_path / "ms_adapter.bin", state), config=CONFIG)
    config = one.config.clip_branch
    assert config.grounding == GroundingConfig(phrase_dim=PHRASE, frequencies=8)
    assert (config.background, config.fit, config.outside) == (False, "stretch", "black")
    assert config.strength == 0.6
    first = load_file(tmp_path / "converted.safetensors")
    changed = {**state, "dummy_image_tokens": state["dummy_image_tokens"] * 100}
    converted(save_pickle(tmp_path / "ms_adapter.bin", changed), config=CONFIG)
    second = load_file(tmp_path / "converted.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any("dummy" in name for name in first)
    again = load_model(tmp_path / "converted.safetensors").state_dict()
    assert again.keys() == first.keys()


def test_full_size(tmp_path, monkeypatch) -> None:
    """Names, shapes and the number of parameters of the public file, on the meta device."""
    config = dataclasses.replace(AnyStoryConfig.sdxl(), subject_qformer=QFormerConfig(queries=16))
    names = public_shapes()
    assert sum(math.prod(shape) for shape in names.values()) == 459_730_816 + 8_192
    source = type("Meta", (), {})()
    source.name, source.shapes, source.files = "ms_adapter.bin", names, ()
    source.check_floats = lambda keys: None
    adapter = Adapter(source, "MS-Diffusion")
    full = adapter.config(AnyStoryConfig.sdxl())
    assert full.clip == BIG_G and full.subject_qformer == config.subject_qformer
    assert full.clip_branch.grounding == GroundingConfig()
    pieces = plan_tensors(full, ("subject_encoder", "clip_projections"), adapter, None)
    assert sum(math.prod(p.shape) for p in pieces.values()) == 459_730_816
    used = {key for piece in pieces.values() for key in piece.keys}
    assert used == set(names) - {"dummy_image_tokens"}
    assert len([n for n in used if n.startswith("ms_adapter.")]) == 140


def public_shapes() -> dict[str, tuple[int, ...]]:
    """As read from the public code at its sizes."""
    image = {
        "grounding_latents": (1, 16, 1280),
        "latent_proj.0.weight": (1664, 832), "latent_proj.0.bias": (1664,),
        "latent_proj.2.weight": (20480, 1664), "latent_proj.2.bias": (20480,),
        "proj_in.weight": (1280, 1664), "proj_in.bias": (1280,),
        "proj_out.weight": (2048, 1280), "proj_out.bias": (2048,),
    }  # fmt: skip
    for name, width in (("latent_norm", 1280), ("attention_norm", 1280), ("norm_out", 2048)):
        image |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for i in range(4):
        for name in ("0.norm1", "0.norm2", "1.0"):
            image |= {f"layers.{i}.{name}.{kind}": (1280,) for kind in ("weight", "bias")}
        image[f"layers.{i}.0.to_q.weight"] = image[f"layers.{i}.0.to_out.weight"] = (1280, 1280)
        image[f"layers.{i}.0.to_kv.weight"] = (2560, 1280)
        image[f"layers.{i}.1.1.weight"], image[f"layers.{i}.1.3.weight"] = (
            (5120, 1280),
            (1280, 5120),
        )
    assert len(image) == 15 + 44
    shapes = {f"image_proj.{name}": shape for name, shape in image.items()}
    # diffusers' order: down, up, middle
    widths = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10
    for place, width in enumerate(widths):
        for member in ("to_k_ip", "to_v_ip"):
            shapes[f"ms_adapter.{2 * place + 1}.{member}.weight"] = (width, 2048)
    return {**shapes, "dummy_image_tokens": (1, 4, 2048)}


def test_encoded_and_saved(tmp_path, model) -> None:
    """States and phrase are kept with the subject, and read again; no background."""
    size = CONFIG.reference.size
    views = prepare_views(torch.rand(1, 20, 20, 3), torch.ones(1, 20, 20), model.config)
    tokens = CONFIG.clip.tokens
    states = torch.randn(1, tokens, CONFIG.clip.width, dtype=torch.float64)
    for phrase in (torch.randn(PHRASE, dtype=torch.float64), None):
        given = PictureStates(clip=states, background=torch.zeros_like(states), phrase=phrase)
        made = encode_subject(model, views, given, label="fox")
        assert made.background_tokens is None and made.states is not None
        assert made.cutout.shape[1:] == (size, size, 3)
        path = tmp_path / f"{phrase is None}.safetensors"
        save_subject(path, made, overwrite=False)
        again = load_subject(path, model)
        assert again.states is not None and torch.equal(again.states, states)
        assert (again.phrase is None) == (phrase is None)
        assert phrase is None or torch.equal(again.phrase, phrase)


@pytest.mark.parametrize("outside", ["zero", "black", "white"])
@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_cut_outs_are_as_the_file_says(fit, outside) -> None:
    """A subject of 8x16 pixels in the middle of a square crop."""
    branch = dataclasses.replace(CONFIG.clip_branch, fit=fit, outside=outside)
    config = dataclasses.replace(CONFIG, clip_branch=branch)
    picture, mask = torch.full((1, 3, 16, 16), 0.25), torch.zeros(1, 1, 16, 16)
    mask[..., 4:12] = 1
    pixels = views_of([(picture, mask)], config).clip[0]
    mean, std = (torch.tensor(x)[:, None] for x in (CLIP_MEAN, CLIP_STD))
    inside = (0.25 - mean) / std
    colour = {"zero": None, "black": 0.0, "white": 1.0}[outside]
    edge = (
        inside
        if fit == "stretch"
        else torch.zeros(3, 1)
        if colour is None
        else (colour - mean) / std
    )
    side = config.clip.image_size
    assert torch.allclose(pixels[:, side // 2, side // 2], inside[:, 0], atol=1e-5)
    for column in (0, side - 1):
        assert torch.allclose(pixels[:, :, column], edge.expand(3, side), atol=1e-5)


def test_training_refuses_it(tmp_path, state) -> None:
    file = save(tmp_path / "ms_adapter.safetensors", state)
    with pytest.raises(CheckpointError, match="whose queries this training does not give a box"):
        with_ip_adapter_sizes(CONFIG, file)
