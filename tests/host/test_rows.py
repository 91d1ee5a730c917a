"""Which batch rows are conditional, for every way in which a guider asks the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from others import PATCHES
from scene import Scene, module
from torch import Tensor

Calls = list[tuple[tuple[int, ...], tuple[int, ...], int]]


@pytest.fixture
def calls(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """(cond rows, uncond rows, rows recorded) of every U-Net call."""
    seen: Calls = []
    build = scene.passes.Call

    def recording(prepared: Any, rows: Any, *args: Any, **others: Any) -> Any:
        call = build(prepared, rows, *args, **others)
        recorded = () if call.recording is None else call.recording.rows
        seen.append((rows.cond, rows.uncond, len(recorded)))
        return call

    monkeypatch.setattr(scene.passes, "Call", recording)
    return seen


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_cfg_together(scene: Scene, calls: Calls, batch: int) -> None:
    scene.sample(scene.apply(), latent_image=scene.latent(batch=batch), steps=1)
    (cond, uncond, recorded) = calls[0]
    assert len(calls) == 1 and recorded == batch
    assert sorted(cond + uncond) == list(range(2 * batch)) and len(cond) == batch


@pytest.mark.parametrize("batch", [1, 3])
def test_cfg_in_split_calls(scene: Scene, calls: Calls, batch: int, split: None) -> None:
    scene.sample(scene.apply(), latent_image=scene.latent(batch=batch), steps=1)
    rows = tuple(range(batch))
    assert sorted(calls) == sorted([(rows, (), batch), ((), rows, 0)])


def test_split_calls_equal_one_call(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scene.apply()
    together = scene.sample(model, steps=1)
    scene.split(monkeypatch)
    apart = scene.sample(model, steps=1)
    scale = together.abs().max()  # float32 rounding of other batch sizes, one step
    torch.testing.assert_close(apart / scale, together / scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 2])
def test_tiles_in_one_call(scene: Scene, calls: Calls, batch: int) -> None:
    """The negative's rows and the positive's, tile by tile."""
    model = PATCHES["batched tiles"](scene, scene.apply())
    scene.sample(model, latent_image=scene.latent(batch=batch), steps=1)
    roles = ([0] * batch + [1] * batch) * 2
    rows = [tuple(i for i, role in enumerate(roles) if role == wanted) for wanted in (1, 0)]
    assert calls == [(*rows, 0)]


def test_cfg_one_has_no_unconditional_rows(scene: Scene, calls: Calls) -> None:
    scene.sample(scene.apply(), cfg=1.0, steps=2)
    assert calls == [((0,), (), 1)] * 2


def test_references_in_uncond_changes_only_with_unconditional_rows(scene: Scene) -> None:
    kept, dropped = scene.apply(references_in_uncond=True), scene.apply()
    assert torch.equal(scene.sample(kept, cfg=1.0), scene.sample(dropped, cfg=1.0))
    assert not torch.allclose(scene.sample(kept), scene.sample(dropped), rtol=0.01, atol=0.01)


def test_basic_guider(scene: Scene, calls: Calls) -> None:
    custom = module("comfy_extras.nodes_custom_sampler")
    scene.guide(custom.BasicGuider.execute(scene.apply(), scene.positive).args[0])
    assert calls == [((0,), (), 1)] * 2


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg(scene: Scene, calls: Calls, style: str, split: None) -> None:
    """Numbers 0, 1, 2 are negative, second and first positive: two conditional, one not."""
    custom = module("comfy_extras.nodes_custom_sampler")
    guider = custom.DualCFGGuider.execute(
        scene.apply(), scene.positive, scene.text("a kite"), scene.negative, 4.0, 3.0, style
    ).args[0]
    scene.guide(guider, steps=1)
    assert sorted(calls) == sorted([((0,), (), 1), ((0,), (), 0), ((), (0,), 0)])


def test_perp_neg(scene: Scene, calls: Calls, split: None) -> None:
    """Positive, negative and empty: only the first is conditional."""
    node = module("comfy_extras.nodes_perpneg").PerpNegGuider
    guider = node.execute(
        scene.apply(), scene.positive, scene.text("blurry"), scene.negative, 5.0, 1.0
    ).args[0]
    scene.guide(guider, steps=1)
    assert sorted(calls) == sorted([((0,), (), 1), ((), (0,), 0), ((), (0,), 0)])


def test_sag_runs_the_negative_as_number_zero(scene: Scene, calls: Calls) -> None:
    scene.sample(PATCHES["SAG"](scene, scene.apply()), steps=1)
    assert len(calls) == 2
    assert calls[1] == ((), (0,), 0)


def test_pag_runs_the_positive_again(scene: Scene, calls: Calls) -> None:
    scene.sample(PATCHES["PAG"](scene, scene.apply()), steps=2)
    assert [c for c in calls if c[1] == ()] == [((0,), (), 0)] * 2


def test_two_prompts_are_both_conditional(scene: Scene, calls: Calls, split: None) -> None:
    both = scene.comfy.ConditioningCombine().combine(scene.positive, scene.text("a kite"))[0]
    scene.sample(scene.apply(), positive=both, steps=1)
    assert sorted(calls) == sorted([((0,), (), 1), ((0,), (), 0), ((), (0,), 0)])


def test_plain_negative_differs_from_background_negative(scene: Scene) -> None:
    """Unconditional rows carry the background's tokens: they too differ from the plain model."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def post(arguments: dict[str, Any]) -> Tensor:
            seen.setdefault(name, arguments["uncond_denoised"].clone())
            return arguments["denoised"]

        return post

    for name, model in (("plain", scene.mini.model.clone()), ("ours", scene.apply())):
        model.set_model_sampler_post_cfg_function(keep(name))
        scene.sample(model, steps=1)
    assert not torch.allclose(seen["plain"], seen["ours"], rtol=1e-3, atol=1e-3)
