"""The host's "out of memory" passes our nodes untouched: the host then unloads models and says so.
torch's error is a RuntimeError, so whoever catches those would hide it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scene import Scene, module, picture


def oom() -> Exception:
    return module("comfy.model_management").OOM_EXCEPTION("no memory left on the stand-in")


class Raising:
    """Stands for anything of the host: called, it raises what it was given."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error


def encode(scene: Scene, error: Exception, **inputs: Any) -> Any:
    image, mask = picture(0)
    return scene.encode_picture(image, mask=mask, **inputs)


def vae(scene: Scene, error: Exception, patch: Any) -> Any:
    encode(scene, error, vae=SimpleNamespace(encode=Raising(error)))


def clip_vision(scene: Scene, error: Exception, patch: Any) -> Any:
    patch.setattr(scene.mini.clip_vision.model, "forward", Raising(error))
    encode(scene, error)


def clip_vision_load(scene: Scene, error: Exception, patch: Any) -> Any:
    patch.setattr(module("comfy.model_management"), "load_model_gpu", Raising(error))
    encode(scene, error)


def our_load(scene: Scene, error: Exception, patch: Any) -> Any:
    host = module("comfy.model_management")
    ours = {id(p) for p in scene.mini.anystory.patchers.values()}
    before = host.load_models_gpu

    def load(models: Any, *args: Any, **kwargs: Any) -> Any:
        if any(id(m) in ours for m in models):
            raise error
        return before(models, *args, **kwargs)

    patch.setattr(host, "load_models_gpu", load)
    encode(scene, error)


def our_modules(scene: Scene, error: Exception, patch: Any) -> Any:
    patch.setattr(scene.mini.anystory.model.reference_net, "forward", Raising(error))
    encode(scene, error)


def label(scene: Scene, error: Exception, patch: Any) -> Any:
    encode_module = module("anystory_pack.nodes.host.sdxl.encode")
    clip = SimpleNamespace(tokenize=lambda _: {}, encode_from_tokens=Raising(error))
    encode_module.label_context(clip, "ball", scene.mini.anystory.model.config)


def words(scene: Scene, error: Exception, patch: Any) -> Any:
    clip = SimpleNamespace(tokenize=scene.mini.clip.tokenize, encode_from_tokens=Raising(error))
    scene.route(mode="text", clip=clip)


def segment_vae(scene: Scene, error: Exception, patch: Any) -> Any:
    broken = SimpleNamespace(encode=Raising(error))
    scene.pack.AnyStorySegment.execute(scene.mini.model, broken, picture(0)[0], scene.route())


def segment_sample(scene: Scene, error: Exception, patch: Any) -> Any:
    patch.setattr(module("comfy.sample"), "sample_custom", Raising(error))
    scene.pack.AnyStorySegment.execute(
        scene.mini.model, scene.mini.vae, picture(0)[0], scene.route()
    )


def sampling(scene: Scene, error: Exception, patch: Any) -> Any:
    """In the middle of a pass, inside our patches."""
    call = module("anystory_pack.anystory_core.injection.call").Call
    patch.setattr(call, "cross_attention", Raising(error))
    scene.sample(scene.apply())


def preparing(scene: Scene, error: Exception, patch: Any) -> Any:
    patch.setattr(scene.passes, "load", Raising(error))
    scene.sample(scene.apply())


def mini_loader(scene: Scene, error: Exception, patch: Any) -> Any:
    patch.setattr(module("comfy.sd"), "VAE", Raising(error))
    scene.pack.LoadAnyStoryMini.execute()


CALLS: tuple[Callable[..., Any], ...] = (
    vae, clip_vision, clip_vision_load, our_load, our_modules, label, words, segment_vae,
    segment_sample, sampling, preparing, mini_loader,
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
def test_it_passes_untouched(
    scene: Scene, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = oom()
    with pytest.raises(type(error)) as caught, monkeypatch.context() as patch:
        call(scene, error, patch)
    assert caught.value is error
    assert torch.isfinite(scene.sample(scene.apply(), steps=1)).all()  # and the host goes on


def test_other_errors_of_a_vae_are_explained(scene: Scene) -> None:
    broken = SimpleNamespace(encode=Raising(RuntimeError("size mismatch")))
    with pytest.raises(scene.errors.ModelMismatchError, match="vae: it cannot .*size mismatch"):
        encode(scene, RuntimeError(), vae=broken)


def test_errors_that_only_a_newer_host_knows(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's error, which the host tells by its words."""
    host = module("comfy.model_management")
    error = RuntimeError("out of memory, says the driver")
    monkeypatch.setattr(host, "is_oom", lambda e: "out of memory" in str(e), raising=False)
    with pytest.raises(RuntimeError) as caught:
        encode(scene, error, vae=SimpleNamespace(encode=Raising(error)))
    assert caught.value is error


@pytest.mark.parametrize(("free", "passes"), [(2.5, [2, 1]), (0.1, [1, 1, 1]), (50.0, [3])])
def test_pictures_at_once_are_bounded_by_free_memory(
    scene: Scene, free: float, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In multiples of what one picture needs; the host is told what all of them need."""
    host, model = module("comfy.model_management"), scene.mini.anystory.model
    memory = module("anystory_pack.anystory_core.subject.encoder").reference_memory
    one = memory(model.config, torch.float32)
    told: list[dict[str, int]] = []
    before = host.load_models_gpu
    ours = {id(p) for p in scene.mini.anystory.patchers.values()}

    def load(models: Any, **kwargs: Any) -> Any:
        if any(id(m) in ours for m in models):
            told.append(kwargs)
        return before(models, **kwargs)

    image, mask = picture(0)
    given = {"image": image.repeat(3, 1, 1, 1), "mask": mask}
    whole = scene.encode_picture(**given)
    seen: list[int] = []
    hook = model.reference_net.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[0])
    )
    try:
        with monkeypatch.context() as patch:
            patch.setattr(host, "load_models_gpu", load)
            patch.setattr(host, "get_free_memory", lambda *_, **__: free * one)
            subject = scene.encode_picture(**given)
    finally:
        hook.remove()
    assert seen == passes
    assert told == [{"memory_required": 3 * one, "minimum_memory_required": one}]
    for a, b in zip(subject.features, whole.features, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize(("part", "number_type"), [("vae", "float16"), ("clip_vision", "bfloat16")])
def test_a_network_that_overflows_is_named(
    scene: Scene, part: str, number_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subject of NaN would give a picture of NaN, and a file that cannot be loaded."""
    dtype, mini = getattr(torch, number_type), scene.mini
    broken = getattr(mini, part)
    if part == "vae":
        monkeypatch.setattr(broken, "vae_dtype", dtype)
        monkeypatch.setattr(broken, "encode", lambda x: torch.full((1, 4, 24, 24), float("nan")))
    else:
        monkeypatch.setattr(broken, "dtype", dtype)
        forward = broken.model.forward

        def overflow(*args: Any, **kwargs: Any) -> Any:
            return [x * float("inf") if torch.is_tensor(x) else x for x in forward(*args, **kwargs)]

        monkeypatch.setattr(broken.model, "forward", overflow)
    wanted = f"^EncodeSubject: {part}: it gave NaN or infinite .* in {number_type}; let it compute"
    with pytest.raises(scene.errors.SubjectError, match=wanted):
        scene.encode(0)
