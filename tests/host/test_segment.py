"""AnyStorySegment in the host: the masks are those of the router's own maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scene import module


def segment(scene: Any, **inputs: Any) -> torch.Tensor:
    given = {"model": scene.mini.model, "vae": scene.mini.vae, "routing": scene.route()}
    given |= {"image": picture(), "noises": 2, "seed": 3, "positive": scene.positive}
    return scene.pack.AnyStorySegment.execute(**{**given, **inputs}).args[0]


def picture(height: int = 128, width: int = 96, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, height, width, 3, generator=generator)


def test_masks_are_disjoint_and_of_the_pictures_size(scene: Any) -> None:
    masks = segment(scene)
    assert masks.shape == (2, 128, 96) and masks.dtype == torch.float32
    assert set(masks.unique().tolist()) <= {0.0, 1.0} and masks.sum(dim=0).max() <= 1
    assert torch.equal(masks, segment(scene))
    assert not torch.equal(masks, segment(scene, seed=4))


def test_a_batch_is_a_row_of_pictures(scene: Any) -> None:
    pictures = picture(batch=2)
    masks = segment(scene, image=pictures)
    assert masks.shape == (4, 128, 96)
    assert torch.equal(masks[2:], segment(scene, image=pictures[1:]))


def test_odd_sizes_and_an_empty_prompt(scene: Any) -> None:
    assert segment(scene, image=picture(101, 67), positive=None).shape == (2, 101, 67)


def test_many_noises_are_the_mean_of_their_maps(scene: Any, pack: Any) -> None:
    """Five noises run as four and one; the mean weighs every noise alike."""
    import importlib

    node = importlib.import_module("anystory_pack.nodes.segment")
    latent = node.encode_picture(scene.mini.vae, picture()[0])
    noise = node.segment.noises(latent.shape[1:], 5, 3)
    arguments = (scene.mini.model, scene.route(), scene.positive, latent)
    single = [node.soft_maps(*arguments, noise[i : i + 1], 0.5) for i in range(5)]
    together = node.soft_maps(*arguments, noise[:4], 0.5)
    # Maps are kept in half precision (2^-11 of values up to 1).
    assert torch.allclose(torch.stack(single[:4]).mean(dim=0), together, atol=1e-3)
    wanted = node.segment.masks_of(torch.stack(single).mean(dim=0), (128, 96))
    differing = (wanted != segment(scene, noises=5)).float().mean()
    assert differing < 0.01  # pixels where two maps tie within that precision


@pytest.mark.parametrize("mode", ["learned", "text"])
def test_subjects_are_projected_once(
    scene: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Three pictures in nine passes; each has the masks that it has alone."""
    projected: list[Any] = []
    prepare = scene.passes.prepare_subjects

    def spy(*args: Any, **kwargs: Any) -> Any:
        projected.append(args)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(scene.passes, "prepare_subjects", spy)
    routing = scene.route(mode=mode, clip=scene.mini.clip)
    pictures = picture(batch=3)
    masks = segment(scene, image=pictures, noises=12, routing=routing)
    assert len(projected) == 1
    last = segment(scene, image=pictures[2:], noises=12, routing=routing)
    assert torch.equal(masks[4:], last)


def test_noise_only(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the range is the model's own highest noise level, and works as the one below."""
    levels: list[float] = []
    sample = module("comfy.sample").sample_custom

    def spy(*args: Any, **kwargs: Any) -> Any:
        levels.append(float(args[4][0]))
        return sample(*args, **kwargs)

    monkeypatch.setattr(module("comfy.sample"), "sample_custom", spy)
    most, below = segment(scene, noise=1.0), segment(scene, noise=0.9999)
    sampling = scene.mini.model.get_model_object("model_sampling")
    assert levels[0] == pytest.approx(float(sampling.sigma_max))
    assert levels[1] == pytest.approx(float(sampling.percent_to_sigma(0.0001)))
    assert (most != below).float().mean() < 0.05


def test_the_model_is_not_changed(scene: Any) -> None:
    before = scene.sample(scene.mini.model)
    segment(scene)
    assert torch.equal(before, scene.sample(scene.mini.model))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("masks", "routing: mode 'masks' would only give your own masks back"),
        ("none", "routing: it has no subject"),
        (
            "applied",
            "model: it already went through an ApplyAnyStory; connect the model from before it",
        ),
        ("off", "routing: no subject acts"),
        ("later", "positive: none of its prompts is used at noise 0.5; raise or lower noise"),
    ],
)
def test_refused(scene: Any, what: str, message: str) -> None:
    inputs: dict[str, Any] = {}
    if what == "masks":
        half = torch.ones(1, 8, 8)
        inputs["routing"] = scene.route(mode="masks", masks=[half, half])
    elif what == "none":
        inputs["routing"] = scene.pack.SubjectRouter.execute(
            anystory=scene.mini.anystory, mode="learned"
        ).args[0]
    elif what == "applied":
        inputs["model"] = scene.apply()
    elif what == "later":
        later = scene.comfy.ConditioningSetTimestepRange()
        inputs["positive"] = later.set_range(scene.positive, 0.9, 1.0)[0]
    else:
        off = [
            scene.pack.AnyStorySubjectOptions.execute(s, 0.0, 0.0, 0.0, 1.0).args[0]
            for s in scene.subjects[:2]
        ]
        inputs["routing"] = scene.route(*off)
    with pytest.raises(scene.errors.AnyStoryError, match=f"AnyStorySegment: {message}"):
        segment(scene, **inputs)
