"""Every neighbour before and after ApplyAnyStory, and the ways a picture is made."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from others import PATCHES, row_by_row, sites
from scene import Scene, halves, module
from torch import Tensor


def differs(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, rtol=0.01, atol=0.01)


@pytest.fixture(scope="module")
def plain(scene: Scene) -> Tensor:
    return scene.sample(scene.mini.model)


@pytest.fixture(scope="module")
def ours(scene: Scene) -> Tensor:
    return scene.sample(scene.apply())


@pytest.mark.parametrize("name", PATCHES)
def test_neighbour(scene: Scene, plain: Tensor, ours: Tensor, name: str) -> None:
    """Both act, in any order of the nodes with the same result; idle, the neighbour is alone."""
    patch = PATCHES[name]
    alone = scene.sample(patch(scene, scene.mini.model))
    assert differs(alone, plain)
    after = scene.sample(scene.apply(patch(scene, scene.mini.model)))
    before = scene.sample(patch(scene, scene.apply()))
    assert torch.isfinite(after).all()
    assert torch.equal(after, before)
    assert differs(after, alone) and differs(after, ours)
    idle = scene.apply(patch(scene, scene.mini.model), strength=0.0, reference_strength=0.0)
    assert torch.equal(scene.sample(idle), alone)


def test_tome_of_the_host(scene: Scene, ours: Tensor) -> None:
    """The host's ToMe merges only at full resolution, where these models have no attention."""
    node = module("comfy_extras.nodes_tomesd").TomePatchModel
    assert torch.equal(scene.sample(node.execute(scene.apply(), 0.5).args[0]), ours)


@pytest.mark.parametrize("name", ["HyperTile", "token merging"])
def test_changed_tokens_are_said_once_per_block(
    scene: Scene, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        scene.sample(PATCHES[name](scene, scene.apply()), steps=3)
    said = [r.getMessage() for r in caplog.records if "goes without the subjects' ref" in r.message]
    assert said and len(said) == len(set(said))


def test_two_neighbours_at_once(scene: Scene, ours: Tensor, way: str) -> None:
    model = scene.mini.model
    for name in ("IP-Adapter, pair keys", "SAG"):
        model = PATCHES[name](scene, model)
    model = scene.apply(model)
    for name in ("LoRA", "PAG"):
        model = PATCHES[name](scene, model)
    out = scene.sample(model)
    assert torch.isfinite(out).all() and differs(out, ours)


# A row alone goes through other matrix kernels than a batch; two steps of a random network amplify
# float32 rounding, and a token near a tie may change its region.
ROWS = {"rtol": 1e-2, "atol": 1e-3}


def test_rows_alone_equal_rows_together(scene: Scene) -> None:
    model = scene.apply()
    latent = scene.latent(batch=2)
    together = scene.sample(model, latent_image=latent)
    alone = scene.sample(row_by_row(scene, model), latent_image=latent)
    scale = together.abs().max()
    torch.testing.assert_close(alone / scale, together / scale, **ROWS)


def test_reference_strengths_between(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strength that is neither 0 nor 1 biases the logits (Eq. 7); both ways of injection do."""
    conditioner = module("anystory_pack.anystory_core.injection.call")
    options = scene.pack.AnyStorySubjectOptions.execute
    weak = options(scene.subjects[0], 1.0, 0.5, 0.0, 1.0).args[0]
    model = scene.apply(routing=scene.route(weak, scene.subjects[1]), reference_strength=3.0)
    out = {}
    for by_region in (True, False):
        monkeypatch.setattr(conditioner, "by_region", lambda q, way=by_region: way)
        out[by_region] = scene.sample(model, steps=1)
    scale = out[True].abs().max()
    torch.testing.assert_close(out[False] / scale, out[True] / scale, **ROWS)
    for strength in (0.0, 1.0):
        other = scene.sample(scene.apply(reference_strength=strength), steps=1)
        assert differs(out[False], other)


def control_net(scene: Scene) -> Any:
    """A ControlNet of the mini model's shape with random weights."""
    cldm, controlnet = module("comfy.cldm.cldm"), module("comfy.controlnet")
    arguments = dict(module("anystory_pack.anystory_core.mini.config").unet_arguments())
    unknown = ("out_channels", "transformer_depth_output", "use_temporal_attention")
    for name in (*unknown, "use_checkpoint"):
        arguments.pop(name)
    net = cldm.ControlNet(hint_channels=3, operations=module("comfy.ops").manual_cast, **arguments)
    generator = torch.Generator().manual_seed(5)
    for weight in net.parameters():
        fan_in = max(1, weight[0].numel())
        weight.data = torch.randn(weight.shape, generator=generator) / fan_in**0.5
    device = module("comfy.model_management").get_torch_device()
    return controlnet.ControlNet(net, load_device=device)


def test_control_net(scene: Scene, plain: Tensor, ours: Tensor) -> None:
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    positive, negative = scene.comfy.ControlNetApplyAdvanced().apply_controlnet(
        scene.positive, scene.negative, control_net(scene), hint, 0.5, 0.0, 1.0
    )
    conds = {"positive": positive, "negative": negative}
    alone = scene.sample(scene.mini.model, **conds)
    both = scene.sample(scene.apply(), **conds)
    assert differs(alone, plain) and differs(both, alone) and differs(both, ours)
    idle = scene.apply(strength=0.0, reference_strength=0.0)
    assert torch.equal(scene.sample(idle, **conds), alone)


def test_inpainting_keeps_what_the_mask_keeps(scene: Scene) -> None:
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1
    latent = {"samples": start, "noise_mask": mask}
    model, maps = scene.apply_with_maps()
    out = scene.sample(model, latent_image=latent, steps=3)
    torch.testing.assert_close(out[..., :8], start[..., :8], rtol=1e-4, atol=1e-4)  # latent scale
    assert differs(out, scene.sample(scene.mini.model, latent_image=latent, steps=3))
    assert scene.preview(maps, out).args[1].shape == (2, 128, 128)


def test_hires_fix(scene: Scene) -> None:
    """Two samplers and two sizes on one patched model; the preview tells the runs apart."""
    model, maps = scene.apply_with_maps()
    first = scene.sample(model)
    larger = torch.nn.functional.interpolate(first, size=(24, 20), mode="bilinear")
    second = scene.sample(
        model, latent_image={"samples": larger}, steps=4, denoise=0.5, sampler_name="dpmpp_2m"
    )
    assert second.shape == (1, 4, 24, 20)
    assert scene.preview(maps, first).args[1].shape == (2, 128, 128)
    assert scene.preview(maps, second).args[1].shape == (2, 192, 160)
    assert len(maps.find(second).record.levels) == 4 and len(maps.find(first).record.levels) == 2


MODES = pytest.mark.parametrize("mode", ["learned", "masks", "learned within masks"])


def two_areas(scene: Scene) -> Any:
    """Two prompts on two areas, the left one first."""
    area, combine = scene.comfy.ConditioningSetArea(), scene.comfy.ConditioningCombine()
    left = area.append(scene.text("a ball"), 64, 128, 0, 0, 1.0)[0]
    right = area.append(scene.text("a box"), 72, 128, 56, 0, 1.0)[0]
    return combine.combine(left, right)[0]


def assert_left_half_recorded(record: Any, mode: str, steps: int = 2) -> None:
    """Every block of every step shows the first positive's area, once."""
    assert len(record.levels) == steps
    for level in record.levels:
        assert list(level.ids) == [site.index for site in record.sites]
        # 8 columns of latent pixels, at strides 2 and 4; its masks are subject 1's alone.
        assert {level.grids[site.index][1] * site.stride for site in record.sites} == {8}
        if mode == "masks":
            assert all(bool((ids == 0).all()) for ids in level.ids.values())


@MODES
def test_area_conditioning(scene: Scene, mode: str) -> None:
    positive = two_areas(scene)
    model, maps = scene.apply_with_maps(routing=scene.route(mode=mode, masks=halves()))
    out = scene.sample(model, positive=positive)
    assert differs(out, scene.sample(scene.mini.model, positive=positive))
    assert_left_half_recorded(maps.find(out).record, mode)


@MODES
def test_area_conditioning_in_split_calls(scene: Scene, mode: str, split: None) -> None:
    """The host gives the negative list a copy of each positive area, its uuid included."""
    model, maps = scene.apply_with_maps(routing=scene.route(mode=mode, masks=halves()))
    out = scene.sample(model, positive=two_areas(scene))
    assert_left_half_recorded(maps.find(out).record, mode)


@MODES
@pytest.mark.parametrize("apart", [False, True], ids=["together", "split"])
@pytest.mark.parametrize("style", ["regular", "nested"])
def test_area_conditioning_with_two_guidances(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, mode: str, apart: bool, style: str
) -> None:
    """DualCFG: the copies of a positive area are in a second conditional list as well."""
    if apart:
        scene.split(monkeypatch)
    model, maps = scene.apply_with_maps(routing=scene.route(mode=mode, masks=halves()))
    node = module("comfy_extras.nodes_custom_sampler").DualCFGGuider
    guider = node.execute(
        model, two_areas(scene), scene.text("a kite"), scene.negative, 4.0, 3.0, style
    ).args[0]
    assert_left_half_recorded(maps.find(scene.guide(guider)).record, mode)


@MODES
@pytest.mark.parametrize("bounds", ["default", "mask bounds"])
def test_masked_prompts(scene: Scene, mode: str, bounds: str) -> None:
    """Each prompt acts inside a mask: on the whole picture, or on the box around the mask."""
    combine = scene.comfy.ConditioningCombine()
    left, right = (
        scene.comfy.ConditioningSetMask().append(scene.text(words), mask, bounds, 1.0)[0]
        for words, mask in zip(("a ball", "a box"), halves(128), strict=True)
    )
    positive = combine.combine(left, right)[0]
    model, maps = scene.apply_with_maps(routing=scene.route(mode=mode, masks=halves()))
    out = scene.sample(model, positive=positive)
    assert differs(out, scene.sample(scene.mini.model, positive=positive))
    record = maps.find(out).record
    if bounds == "mask bounds":
        assert_left_half_recorded(record, mode)
        return
    assert len(record.levels) == 2
    for level in record.levels:
        assert {level.grids[site.index][1] * site.stride for site in record.sites} == {16}


def test_prompts_that_take_turns(scene: Scene) -> None:
    """Each step is recorded, with the routes of the prompt that is used at it."""
    turn = scene.comfy.ConditioningSetTimestepRange()
    early = turn.set_range(scene.text("a ball"), 0.0, 0.5)[0]
    late = turn.set_range(scene.text("a box"), 0.5, 1.0)[0]
    positive = scene.comfy.ConditioningCombine().combine(early, late)[0]
    model, maps = scene.apply_with_maps(routing=scene.route(mode="masks", masks=halves()))
    record = maps.find(scene.sample(model, positive=positive, steps=6)).record
    assert len(record.levels) == 6
    for level in record.levels:
        assert list(level.ids) == [site.index for site in record.sites]


def test_masks_are_followed(scene: Scene) -> None:
    model, maps = scene.apply_with_maps(routing=scene.route(mode="masks", masks=halves()))
    out = scene.sample(model, latent_image=scene.latent(160, 96))
    masks = scene.preview(maps, out).args[1]
    assert masks.shape == (2, 96, 160)
    # The border runs through a token of the coarsest grid (32 pixels wide).
    assert bool((masks[0, :, :56] == 1).all()) and bool((masks[1, :, 104:] == 1).all())


def test_learned_within_masks_never_leaves_them(scene: Scene) -> None:
    model, maps = scene.apply_with_maps(
        routing=scene.route(mode="learned within masks", masks=halves())
    )
    record = maps.find(scene.sample(model)).record
    for level in record.levels:
        for block, ids in level.ids.items():
            height, width = level.grids[block]
            grid = ids.reshape(-1, height, width)
            assert not bool((grid[:, :, : width // 2] == 1).any())
            assert not bool((grid[:, :, width // 2 :] == 0).any())


def test_batch_of_three(scene: Scene) -> None:
    model, maps = scene.apply_with_maps()
    out = scene.sample(model, latent_image=scene.latent(batch=3))
    assert out.shape[0] == 3 and differs(out[0], out[1])
    record = maps.find(out).record
    assert record.rows == 3
    for index in range(3):
        assert scene.preview(maps, out, batch_index=index).args[1].shape == (2, 128, 128)
    routes = [torch.cat([i[row] for i in record.levels[0].ids.values()]) for row in range(3)]
    assert any(not torch.equal(routes[0], r) for r in routes[1:])


@pytest.mark.parametrize("size", [(128, 128), (104, 152), (136, 120), (248, 72)])
def test_sizes(scene: Scene, size: tuple[int, int]) -> None:
    model, maps = scene.apply_with_maps()
    out = scene.sample(model, latent_image=scene.latent(*size))
    assert differs(out, scene.sample(scene.mini.model, latent_image=scene.latent(*size)))
    record = maps.find(out).record
    assert record.blocks == tuple(range(1, len(sites(scene)) + 1))
    assert scene.preview(maps, out).args[1].shape == (2, size[1], size[0])


def test_cfg_one_at_few_steps(scene: Scene) -> None:
    """No unconditional rows at all."""
    model, maps = scene.apply_with_maps()
    out = scene.sample(model, cfg=1.0, steps=1)
    assert differs(out, scene.sample(scene.mini.model, cfg=1.0, steps=1))
    assert len(maps.find(out).record.levels) == 1


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "heun", "dpm_2", "dpmpp_2m_sde", "uni_pc", "lcm", "ddim"]
)
def test_samplers_record_every_step_once(scene: Scene, sampler: str) -> None:
    model, maps = scene.apply_with_maps()
    out = scene.sample(model, sampler_name=sampler, steps=3)
    record = maps.find(out).record
    assert record.steps == 3
    sigmas = [level.sigma for level in record.levels]
    assert sigmas == sorted(sigmas, reverse=True) and len(set(sigmas)) == len(sigmas)
    assert {level.step for level in record.levels} == {0, 1, 2}
    # The second calls of dpm_2 are between the steps' levels; those of heun are on the next one's.
    assert len(sigmas) == (5 if sampler == "dpm_2" else 3)


def test_several_pictures_of_one_subject(scene: Scene) -> None:
    views = torch.rand(3, 60, 80, 3, generator=torch.Generator().manual_seed(0))
    many = scene.encode_picture(views, label="many")
    assert many.views == 3
    first = scene.encode_picture(views[:1], label="many")
    out, one = (
        scene.sample(scene.apply(routing=scene.route(s, scene.subjects[1]))) for s in (many, first)
    )
    assert differs(out, one) and differs(out, scene.sample(scene.mini.model))
    count = len(first.tokens)
    torch.testing.assert_close(many.tokens[:count], first.tokens, rtol=1e-3, atol=1e-3)
