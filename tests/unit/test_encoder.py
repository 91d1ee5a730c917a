"""Encoding: what of several pictures goes where, values that are not finite, memory."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.reference_net import ReferenceNet
from anystory_core.errors import ModelMismatchError, SubjectError
from anystory_core.subject.encoder import (
    SubjectEncoder,
    encode_subject,
    feature_shapes,
    reference_latents,
    reference_memory,
)
from anystory_core.subject.preprocess import latent_mask
from anystory_core.weights.model import AnyStoryModel, build_model

from .encoded import CONFIG, READING, small_model, small_states, small_views

PICTURES = 3


@pytest.fixture(scope="module")
def model() -> AnyStoryModel:
    return small_model(CONFIG)


def encode(model: AnyStoryModel, count: int = PICTURES, **given: Any) -> Any:
    config = model.config
    states = dataclasses.replace(small_states(config, count), **given.pop("states", {}))
    return encode_subject(model, small_views(config, count), states, label="x", **given)


def picture(states: Any, number: int) -> Any:
    """The states of one of several pictures."""
    part = slice(number, number + 1)
    return dataclasses.replace(states, clip=states.clip[part], latents=states.latents[part])


def test_of_several_pictures_tokens_follow_one_another_and_r_is_their_mean(
    model: AnyStoryModel,
) -> None:
    """Eq. 2: E of all pictures side by side; R of a subject is one vector, the mean of theirs. Each
    is that of the picture alone, up to the order in which a batch is summed (float32)."""
    views, states = small_views(CONFIG, PICTURES), small_states(CONFIG, PICTURES)
    whole = encode_subject(model, views, states, label="x")
    alone = [
        encode_subject(
            model,
            dataclasses.replace(views, mask=views.mask[i : i + 1], cutout=views.cutout[i : i + 1]),
            picture(states, i),
            label="x",
        )
        for i in range(PICTURES)
    ]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(whole.tokens, torch.cat([s.tokens for s in alone]), **close)
    routing = torch.stack([s.routing for s in alone])
    torch.testing.assert_close(whole.routing, routing.double().mean(0).float(), **close)
    assert (routing[0] - whole.routing).norm() > 0.1 * whole.routing.norm()
    for i, feature in enumerate(whole.features):
        torch.testing.assert_close(feature, torch.cat([s.features[i] for s in alone]), **close)
    for s in alone:
        assert torch.equal(s.background_tokens, whole.background_tokens)
        assert torch.equal(s.background_routing, whole.background_routing)
    assert whole.views == PICTURES and whole.cutout is views.cutout
    assert (whole.fingerprint, whole.clip_fingerprint) == ("weights-a", "clip-a")


def test_the_background_is_that_of_the_zero_image(model: AnyStoryModel) -> None:
    subject, states = encode(model), small_states(CONFIG, PICTURES)
    assert states.background is not None
    tokens, routing = model.encoder(states.background)
    assert torch.equal(subject.background_tokens, tokens[0])
    assert torch.equal(subject.background_routing, routing[0])


def test_the_mask_is_the_last_channel_of_the_reference(model: AnyStoryModel) -> None:
    states, views = small_states(CONFIG, PICTURES), small_views(CONFIG, PICTURES)
    assert states.latents is not None and model.reference_net is not None
    mask = latent_mask(views.mask, (8, 8))
    assert mask.unique().numel() > 1
    wanted = model.reference_net(torch.cat((states.latents, mask), dim=1))
    for feature, x in zip(encode(model).features, wanted, strict=True):
        assert torch.equal(feature, x.flatten(0, 1))


def test_features_have_the_shapes_that_files_expect(model: AnyStoryModel) -> None:
    features = encode(model).features
    wanted = [(PICTURES * tokens, width) for tokens, width in feature_shapes(CONFIG).values()]
    assert [tuple(x.shape) for x in features] == wanted
    assert list(feature_shapes(CONFIG)) == list(range(2, len(features) + 2))


@pytest.mark.parametrize("config", [CONFIG, READING], ids=["simplified", "original"])
@pytest.mark.parametrize(("at_once", "passes"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (9, [3])])
def test_pictures_go_through_the_reference_net_in_parts(
    config: AnyStoryConfig, at_once: int, passes: list[int]
) -> None:
    model = small_model(config)
    assert model.reference_net is not None
    seen: list[int] = []
    model.reference_net.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    parts, whole = encode(model, at_once=at_once), encode(model)
    assert seen == [*passes, PICTURES]
    for a, b in zip(parts.features, whole.features, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums in another order
        assert a.is_contiguous()


def test_each_picture_may_have_a_text_of_its_own() -> None:
    model = small_model(READING)
    label = torch.randn(PICTURES, 3, 8, generator=torch.Generator().manual_seed(2))
    whole = encode(model, states={"label": label})
    for at_once in (1, 2):
        parts = encode(model, states={"label": label}, at_once=at_once)
        for a, b in zip(parts.features, whole.features, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


PARTS = {
    "clip": ("clip_vision", "float32"),
    "background": ("clip_vision", "float32"),
    "latents": ("vae", "float16"),
    "label": ("clip", "float32"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", PARTS)
def test_a_network_that_gives_no_numbers_is_named(name: str, value: float) -> None:
    """With the type that it computed in, which is not always that of the tensor."""
    part, number_type = PARTS[name]
    bad = getattr(small_states(READING), name).clone()
    bad.view(-1)[-1] = value
    states = {name: bad, "number_types": {"vae": torch.float16}}
    wanted = rf"^{part}: it gave NaN or infinite values, computing in {number_type}; let it compute"
    with pytest.raises(SubjectError, match=wanted):
        encode(small_model(READING), 2, states=states)


@pytest.mark.parametrize(
    ("weight", "part"),
    [
        ("subject.norm_out.bias", "subject encoder"),
        ("routing.norm_out.bias", "routing encoder"),
        ("reference_net", "ReferenceNet"),
    ],
)
def test_our_own_parts_are_named_too(weight: str, part: str) -> None:
    model = small_model(CONFIG)
    assert model.reference_net is not None
    if weight == "reference_net":
        parameter = next(model.reference_net.parameters())
    else:
        parameter = model.encoder.get_parameter(weight)
    parameter.data[...] = float("nan")
    with pytest.raises(SubjectError, match=f"^anystory: {part}: it gave NaN.* in float32;"):
        encode(model)


def test_models_that_hold_a_part() -> None:
    """What is missing is None; a model that gives neither tokens nor features is refused."""
    tokens = encode(build_model(CONFIG, ["subject_encoder", "clip_projections"]))
    assert tokens.tokens is not None and tokens.background_tokens is not None
    assert tokens.routing is tokens.background_routing is None and tokens.features == ()
    kept = build_model(CONFIG, ["reference_net", "reference_projections"])
    features = encode(kept, states={"clip": None})
    assert features.tokens is features.background_tokens is features.routing is None
    assert len(features.features) == len(feature_shapes(CONFIG))
    assert encode(small_model(CONFIG), states={"latents": None}).features == ()
    for model in (build_model(CONFIG, ["routing_encoder", "routers"]), kept):
        with pytest.raises(SubjectError, match="^anystory: these weights hold neither a subject"):
            encode(model, states={"latents": None} | ({"clip": None} if model is kept else {}))


def test_states_of_another_encoder(model: AnyStoryModel) -> None:
    states = small_states(CONFIG, PICTURES)
    assert states.clip is not None
    for wrong in (states.clip[:, 1:], states.clip[..., 1:], states.clip[0]):
        with pytest.raises(ModelMismatchError, match=r"^clip_vision: it gives \(.*expect \(5, 8\)"):
            encode(model, states={"clip": wrong})


def test_latents_at_the_scale_of_the_unet() -> None:
    reference = dataclasses.replace(CONFIG.reference, latent_scale=0.5, latent_shift=2.0)
    model = build_model(dataclasses.replace(CONFIG, reference=reference), ["reference_net"])
    assert torch.equal(
        reference_latents(model, torch.full((1, 4, 8, 8), 5.0)).unique(), torch.tensor([1.5])
    )
    for shape in ((1, 3, 8, 8), (1, 4, 4, 8), (1, 4, 8, 16)):
        with pytest.raises(
            ModelMismatchError, match=r"^vae: it gives .* 64x64, expected \(4, 8, 8"
        ):
            reference_latents(model, torch.zeros(shape))


def test_one_encoder_without_the_other() -> None:
    both = small_model(CONFIG).encoder
    states = small_states(CONFIG).clip
    assert states is not None
    tokens, routing = SubjectEncoder(both.subject, None)(states)
    assert tokens is not None and routing is None
    tokens, routing = SubjectEncoder(None, both.routing)(states)
    assert tokens is None and routing is not None and routing.shape == (2, 8)


class Living(TorchDispatchMode):
    """Counts the bytes of tensors that live, made by operations since it began."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.users: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                self._count(x, function.is_view)
        self.most = max(self.most, sum(self.sizes.values()))
        return made

    def _count(self, x: Tensor, view: bool) -> None:
        key = x.untyped_storage().data_ptr()
        if view and key not in self.sizes:
            return  # of a weight or an input
        self.sizes[key] = x.untyped_storage().nbytes()
        self.users[key] = self.users.get(key, 0) + 1
        weakref.finalize(x, self._forget, key)

    def _forget(self, key: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key], self.sizes[key]


@pytest.mark.parametrize("cross_attention", [False, True])
def test_memory_of_the_reference_net_is_known(cross_attention: bool) -> None:
    """Enough for one picture, and not several times too much, which would make batches small."""
    config = AnyStoryConfig.mini()
    reference = dataclasses.replace(config.reference, cross_attention=cross_attention)
    config = dataclasses.replace(config, reference=reference)
    net = ReferenceNet(config).requires_grad_(False)
    side = reference.size // reference.latent_stride
    given = torch.randn(1, config.unet.in_channels + 1, side, side)
    text = torch.randn(1, 77, config.unet.context_dim) if cross_attention else None
    with Living() as living:
        features = net(given, text)
    kept = sum(x.nbytes for x in features)
    known = reference_memory(config, torch.float32)
    assert kept < living.most <= known <= 4 * living.most
    assert reference_memory(config, torch.float16) * 2 == known


def test_a_subject_keeps_no_graph(model: AnyStoryModel) -> None:
    assert any(p.requires_grad for p in model.encoder.parameters())
    assert not encode(model).tokens.requires_grad
