"""Who computes attention with a mask: only what is known to heed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scene import Scene, halves, module
from torch import Tensor, equal, testing

# Two backends of the host: float32 rounding, amplified by a random network's step.
CLOSE = {"rtol": 1e-2, "atol": 1e-3}


@pytest.fixture
def gpu(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention to subjects takes the way that it takes on a GPU."""
    patcher = module("anystory_pack.nodes.host.sdxl.patcher")
    monkeypatch.setattr(patcher, "on_cpu", lambda _: False)


def test_a_processor_computes_it_by_pytorch(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, whatever the host has chosen; that is asked for the plain model's calls alone."""
    backends = module("comfy.ldm.modules.attention")
    model = scene.apply(routing=scene.route(mode="masks", masks=halves()))
    wanted = scene.sample(model, steps=1)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(backends, "optimized_attention_masked", refuse)
    assert equal(scene.sample(model, steps=1), wanted)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_host_is_asked_where_it_is_quick(
    dtype: torch.dtype, native: bool, pack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor for calls in bfloat16 without a mask, where it has instructions for that: the
    sub-quadratic way, which is the host's choice there, may take a mask's keys in parts."""
    patcher = module("anystory_pack.nodes.host.sdxl.patcher")
    monkeypatch.setattr(patcher, "MULTIPLIES_BFLOAT16", native)
    asked: list[int] = []
    backends = module("comfy.ldm.modules.attention")
    plain = backends.attention_sub_quad

    def count(*args: Any, **options: Any) -> Any:
        asked.append(1)
        return plain(*args, **options)

    for name in ("attention_sub_quad", "optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(backends, name, count)
    make = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 16, generator=make).to(dtype) for n in (6, 9))
    mask = torch.zeros(1, 6, 9, dtype=dtype)
    mask[:, :3, 5:] = -torch.inf
    attend = patcher.RoutedAttention({})
    for given in (None, mask):
        wide = None if given is None else given.float()
        wanted = backends.attention_pytorch(q.float(), k.float(), k.float(), 2, wide)
        found = attend(q, k, k, 2, given)
        # Weights and sums of half precision, of 8 or more bits.
        assert torch.allclose(found.float(), wanted, atol=1e-5 if dtype == torch.float32 else 3e-2)
    assert len(asked) == (native and dtype == torch.bfloat16)


@pytest.mark.usefixtures("gpu")
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


@pytest.mark.usefixtures("gpu")
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


@pytest.mark.usefixtures("gpu")
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


def far_apart(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and a mask: each token's own keys score far less than those that are closed to it, by
    40 in half precision and by 160 in float32; its result is the mean of its own values."""
    apart = 40.0 if dtype.itemsize == 2 else 160.0
    q = torch.ones(1, 64, 16, dtype=dtype)
    k = torch.zeros(1, 320, 16, dtype=dtype)
    k[:, ::2] = apart / 4  # times 16 channels / sqrt(16)
    v = torch.randn(1, 320, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.zeros(1, 64, 320, dtype=dtype)
    mask[:, :, ::2] = -torch.inf
    return q, k, v, mask


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("free", [2.0**14, 2.0**40], ids=["little memory", "much memory"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_masked_calls_of_the_sub_quadratic_way(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, free: float
) -> None:
    backends, memory = module("comfy.ldm.modules.attention"), module("comfy.model_management")
    patcher = module("anystory_pack.nodes.host.sdxl.patcher")
    monkeypatch.setattr(backends, "optimized_attention_masked", backends.attention_sub_quad)
    monkeypatch.setattr(memory, "get_free_memory", lambda *_: (free, free))
    q, k, v, mask = far_apart(dtype)
    out = patcher.RoutedAttention({})(q, k, v, 1, mask)
    wanted = v[:, 1::2].double().mean(dim=1, keepdim=True).expand(-1, 64, -1)
    accuracy = 2 * torch.finfo(dtype).eps  # of values up to 1
    testing.assert_close(out.double(), wanted, rtol=0, atol=accuracy)


@pytest.mark.usefixtures("gpu")
def test_the_sub_quadratic_way_keeps_what_it_does_well(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 with room for all keys at once it is right, and pictures stay what they were."""
    backends, memory = module("comfy.ldm.modules.attention"), module("comfy.model_management")
    patcher = module("anystory_pack.nodes.host.sdxl.patcher")
    monkeypatch.setattr(backends, "optimized_attention_masked", backends.attention_sub_quad)
    q, k, v, mask = far_apart(torch.float32)
    room = 320 * 4 * 4096 * 4  # the host's rule for 320 keys of one head
    used: list[str] = []
    monkeypatch.setattr(patcher, "_pytorch_attention", lambda *_: used.append("pytorch"))
    for free in (room, room - 1):
        monkeypatch.setattr(memory, "get_free_memory", lambda *_, free=free: (free, free))
        out = patcher.RoutedAttention({})(q, k, v, 1, mask)
        assert (out is None) == (free < room)
    assert used == ["pytorch"]


@pytest.mark.usefixtures("gpu")
def test_a_picture_on_the_sub_quadratic_way_in_little_memory(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends, memory = module("comfy.ldm.modules.attention"), module("comfy.model_management")
    model = scene.apply(routing=scene.route(mode="masks", masks=halves()))
    wanted = scene.sample(model, steps=1)
    sub_quad = backends.attention_sub_quad
    masked: list[Any] = []

    def spy(*args: Any, **options: Any) -> Any:
        masked.append(args[4] if len(args) > 4 else options.get("mask"))
        return sub_quad(*args, **options)

    for name in ("attention_sub_quad", "optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(backends, name, spy)
    free = memory.get_free_memory

    def little(device: Any = None, torch_free_too: bool = False) -> Any:
        return (1e6, 1e6) if torch_free_too else free(device)

    monkeypatch.setattr(memory, "get_free_memory", little)
    out = scene.sample(model, steps=1)
    assert masked and all(mask is None for mask in masked)
    scale = wanted.abs().max()
    testing.assert_close(out / scale, wanted / scale, **CLOSE)
