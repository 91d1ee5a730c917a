"""FLUX with subjects beside what others do to the same model."""

from __future__ import annotations

import gc
import importlib
from typing import Any

import flux_parts
import pytest
import torch
from flux_scene import CONFIG
from flux_world import TEXT, FluxWorld
from torch import Tensor


def close(a: Tensor, b: Tensor, limit: float = 1e-5) -> bool:
    return float((a - b).norm() / b.norm()) < limit


def lora(model: Any) -> Any:
    """A clone with patches on layers of every stream, as the host's LoRA loader adds them."""
    generator = torch.Generator().manual_seed(8)
    patches: dict[str, Any] = {}
    for name, weight in model.model.diffusion_model.named_parameters():
        if name.endswith(("qkv.weight", "linear1.weight", "img_in.weight", "txt_mlp.0.weight")):
            noise = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
            patches[f"diffusion_model.{name}"] = (0.5 * noise,)
    patched = model.clone()
    assert len(patched.add_patches(patches)) == len(patches)
    return patched


@pytest.mark.parametrize("count", [1, 2])
def test_a_lora_acts_before_and_after(flux: FluxWorld, count: int) -> None:
    """On all streams, as weights that it was merged into."""
    routing = flux.route(*flux.subjects[:count])
    before = flux.sample(flux.apply(routing, lora(flux.model)))
    after = flux.sample(lora(flux.apply(routing)))
    assert torch.equal(before, after)
    whole = flux_parts.flux_patcher()
    for name, patches in lora(flux.model).patches.items():
        whole.model.get_parameter(name).data += patches[0][1][0]
    assert close(flux.sample(flux.apply(routing, whole)), before)
    assert not close(flux.sample(flux.apply(routing)), before, 1e-2)


def test_another_override_gets_the_unmasked_calls(flux: FluxWorld) -> None:
    """KJNodes puts SageAttention there."""
    seen: list[tuple[int, int]] = []

    def override(function: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kw: Any) -> Tensor:
        seen.append((q.shape[2], k.shape[2]))
        assert kw["transformer_options"]["block_type"] in ("double", "single")
        return function(q, k, v, *args, **kw)

    model = flux.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    routing = flux.route(flux.subjects[0])
    assert torch.equal(flux.sample(flux.apply(routing, model)), flux.sample(flux.apply(routing)))
    assert any(k > q for q, k in seen)  # references among the keys


def test_a_block_replacement_of_another_pack_is_chained(flux: FluxWorld) -> None:
    """It gets our block as the original one, and sees its output."""

    def double(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.3}

    def single(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return {"img": extra["original_block"](args)["img"] * 0.8}

    model = flux.model.clone()
    model.set_model_patch_replace(double, "dit", "double_block", 1)
    model.set_model_patch_replace(single, "dit", "single_block", 0)
    chained = flux.sample(flux.apply(model=model))
    assert not close(chained, flux.sample(flux.apply()), 1e-3)
    assert not close(chained, flux.sample(model), 1e-2)


def control_net() -> Any:
    """A ControlNet for FLUX: residuals for the image tokens of both kinds of blocks."""
    from comfy.controlnet import ControlBase

    class Residuals(ControlBase):
        def get_control(self, x: Tensor, *_: Any) -> Any:
            generator = torch.Generator().manual_seed(4)
            size = -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)
            shape = x.shape[0], size, CONFIG.transformer.width
            return {
                kind: [torch.randn(shape, generator=generator) for _ in range(2)]
                for kind in ("input", "output")
            }

    return Residuals()


@pytest.mark.parametrize("count", [1, 2])
def test_a_control_net_reaches_the_image_alone(flux: FluxWorld, count: int) -> None:
    """Its residuals are counted from the first image token, behind the subjects' tokens."""
    import node_helpers

    control = node_helpers.conditioning_set_values(
        flux.positive, {"control": control_net(), "control_apply_to_uncond": False}
    )
    routing = flux.route(*flux.subjects[:count])
    out = flux.sample(flux.apply(routing), positive=control)
    assert not close(out, flux.sample(flux.apply(routing)), 1e-2)
    assert not close(out, flux.sample(positive=control), 1e-3)
    idle = flux.apply(routing, strength=0.0, reference_strength=0.0)
    assert torch.equal(flux.sample(idle, positive=control), flux.sample(positive=control))


@pytest.mark.parametrize("count", [1, 2])
def test_an_attention_mask_of_the_conditioning(flux: FluxWorld, count: int) -> None:
    """StyleModelApply with a strength: an additive mask over [text, image]."""
    import node_helpers

    size = TEXT + 4 * 5
    routing = flux.route(*flux.subjects[:count])
    plain = flux.sample(flux.apply(routing))
    results: list[Tensor] = []
    for value in (0.0, -2.0):
        mask = torch.zeros(1, size, size)
        mask[:, TEXT:, : TEXT // 2] = value
        masked = node_helpers.conditioning_set_values(
            flux.positive, {"attention_mask": mask, "attention_mask_img_shape": (4, 5)}
        )
        results.append(flux.sample(flux.apply(routing), positive=masked))
    assert close(results[0], plain, 1e-4)
    assert not close(results[1], plain, 1e-3)


def test_custom_sampler_and_guider(flux: FluxWorld) -> None:
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import BasicGuider, Noise_RandomNoise

    model = flux.apply()
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 6)
    basic = getattr(BasicGuider, "execute", None)
    guider = (
        basic(model, flux.positive).args[0]
        if basic is not None
        else BasicGuider().get_guider(model, flux.positive)[0]
    )
    latent = flux.latent()
    noise = Noise_RandomNoise(0).generate_noise(latent)
    sampler = comfy.samplers.sampler_object("euler")
    out = guider.sample(noise, latent["samples"], sampler, sigmas, seed=0)
    assert close(out, flux.sample(model), 1e-5)
    assert close(flux.sample(model, sampler_name="heun"), flux.sample(model), 3.0)


def test_model_sampling_flux(flux: FluxWorld) -> None:
    """Another shift moves the noise levels, not the steps that act."""
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    (shifted,) = ModelSamplingFlux().patch(flux.apply(), 1.15, 0.5, 512, 512)
    seen: list[int] = []
    where = importlib.import_module(f"{flux.pack.__name__}.host.flux.passes")
    with pytest.MonkeyPatch.context() as patch:
        kept = where.FluxCall

        def counted(*args: Any, **kw: Any) -> Any:
            seen.append(1)
            return kept(*args, **kw)

        patch.setattr(where, "FluxCall", counted)
        flux.sample(shifted, steps=25)
    assert len(seen) == 23  # steps 2 to 24


def test_inpainting(flux: FluxWorld) -> None:
    """A noise mask: the part outside is the given latent."""
    mask = torch.zeros(1, 64, 80)
    mask[:, :, 40:] = 1
    latent = {"samples": torch.ones(1, CONFIG.transformer.channels, 8, 10), "noise_mask": mask}
    out = flux.sample(flux.apply(), latent_image=latent)
    assert torch.allclose(out[..., :4], latent["samples"][..., :4], atol=1e-4)
    late = flux.sample(flux.apply(), latent_image={"samples": latent["samples"]}, denoise=0.5)
    assert torch.isfinite(late).all()


class Packed(torch.nn.Module):
    """A layer like GGUF's: the weight is made when it is called, and is no parameter."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.packed = [layer.weight.detach().clone(), layer.bias.detach().clone()]

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, *(part.to(x) for part in self.packed))


@pytest.mark.parametrize("count", [1, 2])
def test_layers_without_parameters(flux: FluxWorld, count: int) -> None:
    model = flux_parts.flux_patcher()
    routing = flux.route(*flux.subjects[:count])
    expected = flux.sample(flux.apply(routing, model))
    for block in (
        *model.model.diffusion_model.double_blocks,
        *model.model.diffusion_model.single_blocks,
    ):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, Packed(layer))
    assert close(flux.sample(flux.apply(routing, model)), expected)


def test_half_precision(flux: FluxWorld) -> None:
    """Not further from float32 than the plain model is, in what the subjects change too."""
    half, routing = flux_parts.flux_patcher(torch.bfloat16), flux.route(flux.subjects[0])
    plain, ours = flux.sample(half), flux.sample(flux.apply(routing, half))
    exact, routed = flux.sample(), flux.sample(flux.apply(routing))
    assert (ours - routed).norm() / routed.norm() < 2 * (plain - exact).norm() / exact.norm()


def test_more_memory_is_planned(flux: FluxWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.sampler_helpers

    shapes: list[Any] = []
    whole = comfy.sampler_helpers.estimate_memory

    def seen(model: Any, shape: Any, *args: Any) -> Any:
        shapes.append(list(shape))
        return whole(model, shape, *args)

    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", seen)
    flux.sample()
    flux.sample(flux.apply())
    plain, ours = shapes
    assert plain[:2] == ours[:2] and plain[3] == ours[3]
    tokens = sum(s.concept.shape[0] + s.routing.shape[0] for s in flux.subjects)
    assert (ours[2] - plain[2]) // 2 * 5 >= tokens


def test_several_pictures_of_a_subject(flux: FluxWorld) -> None:
    both = flux.encode(
        0, image=torch.cat([s.cutout for s in flux.subjects]).float() / 255, mask=None, label="both"
    )
    assert both.views == 2 and both.concept.shape[0] == 8 and both.keep.shape[0] == 2
    out = flux.sample(flux.apply(flux.route(both, flux.subjects[1])))
    assert torch.isfinite(out).all()


def test_a_pack_that_skips_passes(flux: FluxWorld) -> None:
    """TeaCache and EasyCache answer some passes from memory."""

    def skip(executor: Any, *args: Any, **kw: Any) -> Any:
        skip.count += 1
        if skip.count % 3 == 0:
            return skip.last
        skip.last = executor(*args, **kw)
        return skip.last

    skip.count, skip.last = 0, None
    model = flux.apply()
    from comfy.patcher_extension import WrappersMP

    kind = WrappersMP.DIFFUSION_MODEL
    model.add_wrapper_with_key(kind, "cache", skip)
    assert torch.isfinite(flux.sample(model)).all()


def test_memory_is_flat(flux: FluxWorld) -> None:
    """No tensor stays after a run, but for what the preview shows of it."""
    model, maps = flux.apply_with_maps()

    def tensors() -> int:
        gc.collect()
        shown = sum(1 + sum(len(x.ids) for x in run.record.levels) for run in maps.runs)
        return sum(isinstance(x, torch.Tensor) for x in gc.get_objects()) - shown

    counts: list[int] = []
    for seed in range(20):
        flux.sample(model, seed=seed, steps=2)
        if seed in (4, 19):
            counts.append(tensors())
    assert len(maps.runs) == 20 and counts[1] <= counts[0] + 5
