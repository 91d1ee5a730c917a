"""Who computes attention with a mask: only what is known to heed it."""

from __future__ import annotations

from typing import Any

import pytest
from scene import Scene, halves, module
from torch import Tensor, equal, testing

# Two backends of the host: float32 rounding, amplified by a random network's step.
CLOSE = {"rtol": 1e-2, "atol": 1e-3}


def test_sage_attention_gets_no_masks(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a mask and ignores it; then every token would read all subjects."""
    backends = module("comfy.ldm.modules.attention")
    model = scene.apply(routing=scene.route(mode="masks", masks=halves()))
    wanted = scene.sample(model, steps=1)
    plain = backends.optimized_attention

    def sage(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **options: Any) -> Any:
        return plain(q, k, v, heads, **options)

    monkeypatch.setattr(backends, "optimized_attention_masked", sage)
    assert not equal(scene.sample(model, steps=1), wanted)
    monkeypatch.setattr(module("comfy.model_management"), "sage_attention_enabled", lambda: True)
    scale = wanted.abs().max()
    testing.assert_close(scene.sample(model, steps=1) / scale, wanted / scale, **CLOSE)


def test_flash_attention_gets_no_masks(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails on a mask, and the host logs that at every call."""
    backends = module("comfy.ldm.modules.attention")
    model = scene.apply(routing=scene.route(mode="masks", masks=halves()))
    wanted = scene.sample(model, steps=1)
    plain = backends.optimized_attention_masked
    masked: list[Any] = []

    def flash(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **options: Any) -> Any:
        masked.append(mask)
        return plain(q, k, v, heads, mask, **options)

    monkeypatch.setattr(backends, "optimized_attention_masked", flash)
    scene.sample(model, steps=1)
    assert any(mask is not None for mask in masked)
    masked.clear()
    monkeypatch.setattr(module("comfy.model_management"), "flash_attention_enabled", lambda: True)
    scale = wanted.abs().max()
    testing.assert_close(scene.sample(model, steps=1) / scale, wanted / scale, **CLOSE)
    assert all(mask is None for mask in masked)


def test_another_packs_attention_gets_no_masks(scene: Scene) -> None:
    """It has all other calls."""
    model = scene.apply(routing=scene.route(mode="masks", masks=halves()))
    wanted = scene.sample(model, steps=1)
    calls: list[Any] = []

    def override(plain: Any, *args: Any, mask: Any = None, **options: Any) -> Any:
        calls.append(args[4] if len(args) > 4 else mask)
        return plain(*args[:4], **options)

    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert equal(scene.sample(patched, steps=1), wanted)
    assert calls and all(mask is None for mask in calls)
