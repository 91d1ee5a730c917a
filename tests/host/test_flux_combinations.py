"""FLUX with subjects beside what others do to the same model."""

from __future__ import annotations

import gc
import importlib
import inspect
from typing import Any

import flux_parts
import pytest
import torch
from flux_scene import CONFIG
from flux_world import TEXT, FluxWorld
from threads import at_once
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


@pytest.mark.parametrize("mode", ["learned", "masks"])
def test_areas_are_pictures_of_their_own(flux: FluxWorld, mode: str) -> None:
    """Two prompts for two parts of the picture, in one step: each part is what a run of that part
    alone gives, with its part of the masks."""
    import comfy.sample
    import node_helpers

    noise = torch.randn(1, CONFIG.transformer.channels, 8, 12, generator=torch.manual_seed(3))
    rows = torch.zeros(1, 8, 12)
    rows[:, :3] = 1  # not the same in both parts
    rows[:, :, 8:] = 1
    masks = [rows, 1 - rows]

    def drawn(positive: Any, noise: Tensor, masks: list[Tensor]) -> Tensor:
        model = flux.apply(flux.route(mode=mode, masks=masks), reference_start=0.0)
        return comfy.sample.sample(
            model, noise, 1, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise),
            disable_pbar=True,
        )  # fmt: skip

    both: list[Any] = []
    parts: list[Tensor] = []
    for seed, first, width in ((1, 0, 4), (5, 4, 8)):
        prompt = flux.prompt(seed)
        area = {"area": (8, width, 0, first)}
        both += node_helpers.conditioning_set_values(prompt, area)
        part = slice(first, first + width)
        parts.append(drawn(prompt, noise[..., part], [mask[..., part] for mask in masks]))
    whole = drawn(both, noise, masks)
    assert close(whole, torch.cat(parts, dim=-1), 1e-5)
    assert not close(whole, drawn(flux.prompt(1), noise, masks), 1e-2)


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


def test_easy_cache(flux: FluxWorld) -> None:
    """The host's own, before and behind: it answers some steps from memory."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    def cached(model: Any) -> Any:
        return EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0]

    skipped: list[int] = []
    where = importlib.import_module(f"{flux.pack.__name__}.host.flux.passes")
    with pytest.MonkeyPatch.context() as patch:
        kept = where.FluxCall

        def counted(*args: Any, **kw: Any) -> Any:
            skipped.append(1)
            return kept(*args, **kw)

        patch.setattr(where, "FluxCall", counted)
        before = flux.sample(flux.apply(model=cached(flux.model)), steps=12)
        calls = len(skipped)
        behind = flux.sample(cached(flux.apply()), steps=12)
    assert torch.equal(before, behind)
    assert 0 < calls < 11  # of steps 1 to 11, in which something acts
    assert not close(before, flux.sample(cached(flux.model), steps=12), 1e-2)


def older_forward(
    self: Any,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    timesteps: Tensor,
    y: Tensor,
    guidance: Tensor,
    transformer_options: dict[str, Any],
    attn_mask: Tensor | None = None,
) -> Tensor:
    """As packs have it that keep a copy of an older host's forward (TeaCache): blocks and their
    replacements are given no options."""
    from comfy.ldm.flux.layers import timestep_embedding

    img, vec = self.img_in(img), self.time_in(timestep_embedding(timesteps, 256).to(img.dtype))
    vec = vec + self.guidance_in(timestep_embedding(guidance, 256).to(img.dtype))
    vec, txt = vec + self.vector_in(y), self.txt_in(txt)
    pe = self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
    replace = transformer_options.get("patches_replace", {}).get("dit", {})
    rest = {"vec": vec, "pe": pe, "attn_mask": attn_mask}
    for i, block in enumerate(self.double_blocks):

        def double(args: dict[str, Any], block: Any = block) -> dict[str, Any]:
            image, text = block(**args)
            return {"img": image, "txt": text}

        args = {"img": img, "txt": txt, **rest}
        found = replace.get(("double_block", i))
        out = double(args) if found is None else found(args, {"original_block": double})
        img, txt = out["img"], out["txt"]
    img = torch.cat((txt, img), dim=1)
    for i, block in enumerate(self.single_blocks):

        def single(args: dict[str, Any], block: Any = block) -> dict[str, Any]:
            return {"img": block(args["img"], **{name: args[name] for name in rest})}

        args = {"img": img, **rest}
        found = replace.get(("single_block", i))
        img = (single(args) if found is None else found(args, {"original_block": single}))["img"]
    return self.final_layer(img[:, txt.shape[1] :], vec)


@pytest.mark.parametrize("count", [1, 2])
def test_a_copy_of_an_older_forward(
    flux: FluxWorld, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = flux.apply(flux.route(*flux.subjects[:count]))
    plain, expected = flux.sample(), flux.sample(model)
    net = flux.model.model.diffusion_model
    seen: list[int] = []

    def forward(*args: Any, **kw: Any) -> Tensor:
        seen.append(1)
        named = inspect.signature(whole).bind(*args, **kw).arguments
        kept = inspect.signature(older_forward).parameters
        return older_forward(net, **{name: x for name, x in named.items() if name in kept})

    whole = net.forward_orig
    monkeypatch.setattr(net, "forward_orig", forward)
    assert close(flux.sample(), plain)
    assert close(flux.sample(model), expected) and len(seen) == 12


def test_blocks_with_other_tokens_go_without(
    flux: FluxWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """Another pack takes tokens away between two blocks; the run goes on, and says so once."""
    from comfy.patcher_extension import WrappersMP

    def cut(executor: Any, x: Tensor, *args: Any, **kw: Any) -> Any:
        (options,) = (arg for arg in args if isinstance(arg, dict) and "sigmas" in arg)
        options["patches"] = {"post_input": [shorter]}
        return executor(x, *args, **kw)

    def shorter(args: dict[str, Any]) -> dict[str, Any]:
        text = args["txt"].shape[1] - 1
        return {**args, "txt": args["txt"][:, :text], "txt_ids": args["txt_ids"][:, :text]}

    for count in (1, 2):
        caplog.clear()
        model = flux.apply(flux.route(*flux.subjects[:count]))
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", cut)
        assert torch.isfinite(flux.sample(model)).all()
        assert caplog.text.count("another node changes them") == 1


def test_what_acts_inside_of_a_block_is_told(
    flux: FluxWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """Newer hosts have places there; where the router decides, the blocks are ours."""
    model = flux.model.clone()
    patches = {"attn1_output_patch": [lambda attention, options: attention]}
    model.model_options["transformer_options"]["patches"] = patches
    flux.sample(flux.apply(flux.route(flux.subjects[0]), model))
    assert "does not act" not in caplog.text
    flux.sample(flux.apply(model=model))
    assert caplog.text.count("'attn1_output_patch' does not act") == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_compiled_model(flux: FluxWorld, count: int) -> None:
    """By the host's own wrapper, without a compiler behind it: graphs break where we are asked."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    routing = flux.route(*flux.subjects[:count])
    expected = flux.sample(flux.apply(routing), steps=3)
    compiled = flux.apply(routing).clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    assert close(flux.sample(compiled, steps=3), expected)


def test_style_model_apply(flux: FluxWorld) -> None:
    """The host's own node: more tokens in the text, or a bias on them."""
    from types import SimpleNamespace

    from nodes import StyleModelApply

    tokens = torch.randn(
        1, 3, CONFIG.transformer.context_dim, generator=torch.Generator().manual_seed(6)
    )
    style = SimpleNamespace(get_cond=lambda _: tokens.clone())
    routing, plain = flux.route(), flux.sample(flux.apply())
    found: list[Tensor] = []
    for strength, kind in ((1.0, "multiply"), (0.4, "multiply"), (0.4, "attn_bias")):
        (positive,) = StyleModelApply().apply_stylemodel(flux.positive, style, None, strength, kind)
        found.append(flux.sample(flux.apply(routing), positive=positive))
        assert not close(found[-1], flux.sample(positive=positive), 1e-2)
    assert not any(close(x, y, 1e-3) for x, y in zip(found, (plain, *found), strict=False))


def test_sampler_custom_advanced_and_flux_guidance(flux: FluxWorld) -> None:
    from comfy_extras import nodes_custom_sampler as nodes
    from comfy_extras.nodes_flux import FluxGuidance

    def result(node: Any, *args: Any) -> Any:
        out = node.execute(*args)
        return getattr(out, "args", out)[0]

    model = flux.apply()
    positive = result(FluxGuidance, flux.positive, 2.0)
    guider = result(nodes.BasicGuider, model, positive)
    noise, sampler = result(nodes.RandomNoise, 0), result(nodes.KSamplerSelect, "euler")
    sigmas = result(nodes.BasicScheduler, model, "simple", 6, 1.0)
    out = result(nodes.SamplerCustomAdvanced, noise, guider, sampler, sigmas, flux.latent())
    assert close(out["samples"], flux.sample(model, positive=flux.prompt(1, guidance=2.0)))
    assert not close(out["samples"], flux.sample(model), 1e-2)


@pytest.mark.parametrize("count", [1, 2])
def test_partial_loading(flux: FluxWorld, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the model's layers stay behind and are cast where they stand, as with --lowvram."""
    import comfy.model_management as mm

    routing = flux.route(*flux.subjects[:count])
    expected = flux.sample(flux.apply(routing))
    whole, left = mm.load_models_gpu, []

    def load(models: Any, *args: Any, **kw: Any) -> Any:
        result = whole(models, *args, **kw)
        for patcher in models:
            patcher.unpatch_model(patcher.offload_device)
            size = patcher.model_size()
            patcher.load(patcher.load_device, lowvram_model_memory=size // 2)
            left.append(size - patcher.loaded_size())
        return result

    monkeypatch.setattr(mm, "load_models_gpu", load)
    assert close(flux.sample(flux.apply(routing, flux_parts.flux_patcher())), expected)
    assert len(left) == 1 + 2 * (count - 1) and all(size > 0 for size in left)


def test_conds_in_threads(flux: FluxWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that spreads the conds over devices evaluates them at the same time."""
    import comfy.samplers

    model = flux.apply(references_in_uncond=True)
    wanted = flux.sample(model, cfg=2.0, steps=3)
    monkeypatch.setattr(
        comfy.samplers, "_calc_cond_batch", at_once(comfy.samplers._calc_cond_batch)
    )
    assert close(flux.sample(model, cfg=2.0, steps=3), wanted)


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
