"""The `text` modes in the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scene import Scene, halves, module


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
