"""The `text` modes in the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scene import Scene, halves, module
from torch import Tensor


@pytest.fixture
def sources(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every source of routes that a run makes, in order."""
    made: list[Any] = []
    build = scene.passes.build_source

    def spy(*args: Any) -> Any:
        made.append(build(*args))
        return made[-1]

    monkeypatch.setattr(scene.passes, "build_source", spy)
    return made


def route(scene: Scene, mode: str = "text", masks: Any = (), **inputs: Any) -> Any:
    given = {f"subject_{i}": s for i, s in enumerate(scene.subjects[:2], 1)}
    given |= {f"mask_{i}": m for i, m in enumerate(masks, 1)}
    given |= {"clip": scene.mini.clip, **inputs}
    return scene.pack.SubjectRouter.execute(anystory=scene.mini.anystory, mode=mode, **given).args[
        0
    ]


def test_labels_are_encoded_alone(scene: Scene) -> None:
    """A label's states are those of its own tokens in a prompt of nothing else."""
    routing = route(scene)
    assert [s.label for s in scene.subjects[:2]] == ["ball", "box"]
    for label, states in zip(("ball", "box"), routing.labels, strict=True):
        whole = scene.text(label)[0][0][0].float()
        assert states.shape[0] >= 1
        assert torch.allclose(states, whole[1 : 1 + states.shape[0]], atol=1e-5)
    texts = module("anystory_pack.nodes.host.texts")
    config = scene.mini.anystory.model.config
    one = texts.encode_label(scene.mini.clip, "ball", config)[1]
    assert texts.encode_label(scene.mini.clip, "ball ball ball", config)[1] == 3 * one
    assert texts.encode_label(scene.mini.clip, "", config)[1] == 0


def test_keys_are_the_blocks_own_with_patches(scene: Scene, sources: list[Any]) -> None:
    """`attn2.to_k` of each block, with the model's weight patches (as a LoRA's), once per run."""
    model = scene.mini.model.clone()
    sites = scene.mini.anystory.model.sites
    make = torch.Generator().manual_seed(0)
    delta = {site.index: torch.randn(site.channels, 256, generator=make) * 0.05 for site in sites}
    model.add_patches(
        {
            f"diffusion_model.{site.ldm}.attn2.to_k.weight": ("diff", (delta[site.index],))
            for site in sites
        },
        1.0,
    )
    routing = route(scene)
    scene.sample(scene.apply(model, routing))
    scene.sample(scene.apply(scene.mini.model, routing))
    patched, plain = sources
    states = torch.cat(routing.labels)
    for site in sites:
        weight = scene.mini.model.model.diffusion_model.get_submodule(site.ldm).attn2.to_k.weight
        own = states @ weight.float().T
        changed = states @ (weight.float() + delta[site.index]).T
        # the model may compute in half precision
        scale = float(changed.abs().max())
        assert float((plain._keys[site.index].float() - own).abs().max()) < 0.02 * scale
        assert float((patched._keys[site.index].float() - changed).abs().max()) < 0.02 * scale
        assert float((own - changed).abs().max()) > 0.1 * scale


def test_text_routes_are_recorded_and_change_the_picture(scene: Scene) -> None:
    model, maps = scene.apply_with_maps(routing=route(scene))
    latent = scene.sample(model)
    plain = scene.sample(scene.mini.model)
    assert (latent - plain).norm() > 0.05 * plain.norm()
    out = scene.preview(maps, latent)
    assert out.args
    again = scene.sample(scene.apply(routing=route(scene)))
    assert torch.equal(latent, again)  # the running mean is of one run only


def test_text_within_masks(scene: Scene, sources: list[Any]) -> None:
    """No token of a subject's route lies outside its mask."""
    routing = route(scene, "text within masks", halves())
    scene.sample(scene.apply(routing=routing))
    (source,) = sources
    site = scene.mini.anystory.model.sites[0]
    q = torch.randn(1, 64, site.channels, generator=torch.Generator().manual_seed(1))
    maps = source.maps_of_query(site, q, (8, 8), (), source.memory(None)).maps
    ids = maps.argmax(1).reshape(8, 8)
    assert not bool((ids[:, 4:] == 0).any())
    assert not bool((ids[:, :4] == 1).any())


def test_what_is_missing_is_said(scene: Scene) -> None:
    error = scene.errors.RoutingError
    with pytest.raises(error, match="SubjectRouter: mode 'text': connect the clip"):
        route(scene, clip=None)
    with pytest.raises(error, match="both labelled 'ball'"):
        route(scene, subject_2=scene.encode(1, label=" Ball "))
    with pytest.raises(error, match="SubjectRouter: mode 'text': subject 2 has no label; give"):
        route(scene, subject_2=scene.encode(1))
    with pytest.raises(error, match="mask of subject"):
        route(scene, "text within masks")
    twins = route(scene, "text within masks", halves(), subject_2=scene.encode(1, label="ball"))
    assert len(twins.labels) == 2


def test_an_error_while_sampling_names_the_node_of_its_settings(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host calls it the sampler's; a node that samples on its own is named once."""
    message = "routing: made for 3 subjects"

    def fail(*args: Any) -> Any:
        raise scene.errors.RoutingError(message)

    monkeypatch.setattr(scene.passes, "build_source", fail)
    with pytest.raises(scene.errors.RoutingError, match=f"^ApplyAnyStory: {message}"):
        scene.sample(scene.apply(routing=route(scene)))
    with pytest.raises(scene.errors.RoutingError, match=f"^AnyStorySegment: {message}"):
        scene.pack.AnyStorySegment.execute(
            model=scene.mini.model,
            vae=scene.mini.vae,
            image=torch.rand(1, 64, 64, 3),
            routing=route(scene),
            positive=scene.positive,
        )


def test_prompts_in_calls_of_their_own_do_not_share_a_mean(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts give the same picture in one call and in two."""
    both = scene.comfy.ConditioningCombine().combine(scene.positive, scene.text("a kite"))[0]
    model = scene.apply(routing=route(scene))
    together = scene.sample(model, positive=both, steps=1)
    scene.split(monkeypatch)
    apart = scene.sample(model, positive=both, steps=1)
    scale = together.abs().max()  # float32 rounding of other batch sizes, one step
    torch.testing.assert_close(apart / scale, together / scale, rtol=1e-2, atol=1e-3)


def hooked(scene: Scene, words: str, seed: int, keyframes: Any = None) -> Any:
    """A prompt with a LoRA of its own on every attn2.to_k, as a hook."""
    hooks = module("comfy.hooks")
    make = torch.Generator().manual_seed(seed)
    weights = {}
    for site in scene.mini.anystory.model.sites:
        name = "lora_unet_" + f"{site.ldm}.attn2.to_k".replace(".", "_")
        weights[f"{name}.lora_up.weight"] = torch.randn(site.channels, 4, generator=make)
        weights[f"{name}.lora_down.weight"] = torch.randn(4, 256, generator=make) / 16
    group = hooks.create_hook_lora(weights, 1.0, 0.0)
    if keyframes is not None:
        group.set_keyframes_on_hooks(keyframes)
    return hooks.set_hooks_for_conditioning(scene.text(words), hooks=group)


def test_keys_belong_to_the_weights_they_were_made_with(scene: Scene) -> None:
    """Prompts with LoRA hooks: their order means nothing."""
    combine = scene.comfy.ConditioningCombine().combine
    first, second = hooked(scene, "a ball", 1), hooked(scene, "a box", 2)
    model = scene.apply(routing=route(scene))
    one = scene.sample(model, positive=combine(first, second)[0])
    other = scene.sample(model, positive=combine(second, first)[0])
    assert not torch.allclose(one, scene.sample(model, positive=first), rtol=0.01, atol=0.01)
    scale = one.abs().max()
    # The host adds up the two prompts in the other order.
    torch.testing.assert_close(other / scale, one / scale, rtol=1e-3, atol=1e-4)


def test_keyframes_of_hooks_change_the_keys(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys follow the weights from step to step."""
    hooks = module("comfy.hooks")
    frames = hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.0, 0.5)):
        frames.add(hooks.HookKeyframe(strength=strength, start_percent=start))
    words = module("anystory_pack.anystory_core.routing.words").TextRoutes
    made: list[Tensor] = []
    scores = words.scores

    def spy(self: Any, site: Any, q: Tensor) -> Tensor:
        if site.index == 1:
            states = torch.cat(self.texts.labels)[None].to(q)
            made.append(self.texts.keys(site, states))
            assert torch.equal(self._keys_of(site, q), made[-1][0])
        return scores(self, site, q)

    monkeypatch.setattr(words, "scores", spy)
    positive = hooked(scene, "a ball", 1, frames)
    scene.sample(scene.apply(routing=route(scene)), positive=positive, steps=4)
    assert len(made) == 4 and torch.equal(made[0], made[1]) and torch.equal(made[2], made[3])
    assert not torch.allclose(made[1], made[2], rtol=0.1, atol=0.1)


class Interleaving:
    """An encoder that gives each token's key and value in turn (CLIPNegPip): the state, times each
    of ``factors``."""

    def __init__(self, clip: Any, *factors: float) -> None:
        self.clip, self.factors = clip, factors

    def tokenize(self, text: str) -> Any:
        return self.clip.tokenize(text)

    def encode_from_tokens(self, tokens: Any) -> Any:
        states = self.clip.encode_from_tokens(tokens)
        return torch.stack([states * factor for factor in self.factors], dim=2).flatten(1, 2)


def test_an_encoder_that_interleaves_keys_and_values(scene: Scene) -> None:
    plain, both = route(scene), route(scene, clip=Interleaving(scene.mini.clip, 1.0, 1.0))
    for own, other in zip(plain.labels, both.labels, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("factors", [(1.0, -1.0), (1.0, 1.0, 1.0)])
def test_an_encoder_of_another_layout_is_refused(scene: Scene, factors: tuple[float, ...]) -> None:
    count = 77 * len(factors)
    message = f"SubjectRouter: clip: it gives {count} text states for the 77 tokens of the label"
    with pytest.raises(scene.errors.ModelMismatchError, match=message):
        route(scene, clip=Interleaving(scene.mini.clip, *factors))
