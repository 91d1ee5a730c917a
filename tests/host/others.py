"""Other packs' patches, as their users meet them: each takes a scene and a model, gives a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from scene import Scene, module
from torch import Tensor

Patch = Callable[[Scene, Any], Any]


def _extra(file: str, node: str, **inputs: Any) -> Patch:
    def patch(scene: Scene, model: Any) -> Any:
        found = getattr(module(f"comfy_extras.nodes_{file}"), node)
        if hasattr(found, "execute"):
            return found.execute(model=model, **inputs)[0]
        return getattr(found(), found.FUNCTION)(model, **inputs)[0]

    return patch


def lora(scene: Scene, model: Any) -> Any:
    """A LoRA on every attn1.to_q and attn2.to_v of the U-Net."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for key, value in model.model.diffusion_model.state_dict().items():
        if key.endswith(("attn1.to_q.weight", "attn2.to_v.weight")):
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            out, inner = value.shape
            weights[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
            weights[f"{name}.lora_down.weight"] = torch.randn(4, inner, generator=generator) / inner
    return module("comfy.sd").load_lora_for_models(model, None, weights, 1.0, 0)[0]


def sites(scene: Scene) -> list[tuple[str, int, int]]:
    """(part, number, index) of every block."""
    return [(s.part, s.number, s.block_index) for s in scene.mini.anystory.model.sites]


def _added(q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
    """Attention over the text plus attention over a picture's own keys, as IP-Adapter does."""
    attention = module("comfy.ldm.modules.attention").optimized_attention
    generator = torch.Generator().manual_seed(q.shape[-1])
    own = torch.randn(2, 1, 4, q.shape[-1], generator=generator).to(q)
    text = attention(q, k, v, options["n_heads"])
    batch = q.shape[0]
    pictures = own.expand(-1, batch, -1, -1)
    return text + 0.5 * attention(q, pictures[0], pictures[1], options["n_heads"])


def ip_adapter_triples(scene: Scene, model: Any) -> Any:
    """IPAdapter_plus: a replacement per transformer block."""
    patched = model.clone()
    for part, number, index in sites(scene):
        patched.set_model_attn2_replace(_added, part, number, index)
    return patched


def ip_adapter_pairs(scene: Scene, model: Any) -> Any:
    """Older adapters: one replacement per SpatialTransformer."""
    patched = model.clone()
    for part, number in {(p, n) for p, n, _ in sites(scene)}:
        patched.set_model_attn2_replace(_added, part, number)
    return patched


def attn1_replacement(scene: Scene, model: Any) -> Any:
    """Reference-style packs: a self-attention of their own in two blocks, sharp enough to show on
    the mini model, whose self-attention says little."""

    def sharper(q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
        attention = module("comfy.ldm.modules.attention").optimized_attention
        return attention(8 * q, k, v, options["n_heads"])

    patched = model.clone()
    patched.set_model_attn1_replace(sharper, "input", 5, 1)
    patched.set_model_attn1_replace(sharper, "output", 1)
    return patched


def token_merge(scene: Scene, model: Any) -> Any:
    """ToMe's two patch points, with plain halving so that every block is merged."""

    def halve(q: Tensor, k: Tensor, v: Tensor, options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return q[:, ::2], k, v

    def double(out: Tensor, options: Any) -> Tensor:
        _, _, height, width = options["activations_shape"]
        return out.repeat_interleave(2, dim=1)[:, : height * width]

    patched = model.clone()
    patched.set_model_attn1_patch(halve)
    patched.set_model_attn1_output_patch(double)
    return patched


def couple(scene: Scene, words: str | None) -> tuple[Any, Any]:
    """The two patches of Attention Couple (ComfyUI-ppm and its kin): the conditional rows are
    repeated for a second prompt, their own when ``words`` is None; each prompt has one half of the
    picture."""
    other = None if words is None else scene.text(words)[0][0]

    def repeat(q: Tensor, k: Tensor, v: Tensor, options: Any) -> tuple[Tensor, Tensor, Tensor]:
        chunks = options["cond_or_uncond"]
        out: list[list[Tensor]] = [[], [], []]
        for chunk, *parts in zip(chunks, *(x.chunk(len(chunks)) for x in (q, k, v)), strict=True):
            for kind, (rows, part) in enumerate(zip(out, parts, strict=True)):
                rows.append(part)
                if chunk == 0:
                    second = part if other is None or kind == 0 else other.to(part)
                    rows.append(second.expand_as(part))
        return torch.cat(out[0]), torch.cat(out[1]), torch.cat(out[2])

    def merge(out: Tensor, options: Any) -> Tensor:
        chunks = options["cond_or_uncond"]
        _, _, height, width = options["activations_shape"]
        left = (torch.arange(width) < width // 2).expand(height, width).reshape(1, -1, 1).to(out)
        parts = iter(out.chunk(sum(1 if chunk else 2 for chunk in chunks)))
        halves = [
            next(parts) if chunk else next(parts) * left + next(parts) * (1 - left)
            for chunk in chunks
        ]
        return torch.cat(halves)

    return repeat, merge


def attention_couple(scene: Scene, model: Any, words: str | None = "a kite") -> Any:
    """A second prompt for the right half, by :func:`couple`."""
    repeat, merge = couple(scene, words)
    patched = model.clone()
    patched.set_model_attn2_patch(repeat)
    patched.set_model_attn2_output_patch(merge)
    return patched


def late_couple(scene: Scene, model: Any) -> Any:
    """The same, put before all patches that are there when the U-Net is called."""
    repeat, merge = couple(scene, None)

    def wrapper(apply: Any, arguments: dict[str, Any]) -> Tensor:
        options = arguments["c"]["transformer_options"]
        patches = dict(options.get("patches", {}))
        for slot, patch in (("attn2_patch", repeat), ("attn2_output_patch", merge)):
            patches[slot] = [patch, *patches.get(slot, ())]
        c = {**arguments["c"], "transformer_options": {**options, "patches": patches}}
        return apply(arguments["input"], arguments["timestep"], **c)

    patched = model.clone()
    patched.set_model_unet_function_wrapper(wrapper)
    return patched


def hook_couple(scene: Scene, positive: Any) -> Any:
    """The same, put on a cond by a hook, whose patches the host merges anew for every call, in
    front of all others (prompt-control)."""
    hooks = module("comfy.hooks")
    repeat, merge = couple(scene, None)
    patches = {"attn2_patch": [repeat], "attn2_output_patch": [merge]}
    group = hooks.HookGroup()
    group.add(hooks.TransformerOptionsHook({"patches": patches}, hooks.EnumHookScope.HookedOnly))
    return hooks.set_hooks_for_conditioning(positive, hooks=group, append_hooks=True)


def copied_options(scene: Scene, model: Any) -> Any:
    """Evaluates the conditional once more, with a copy of the model's options that was made when
    its node ran, and takes only that (AutomaticCFG)."""
    samplers = module("comfy.samplers")
    kept = copy.deepcopy(model.model_options)

    def again(args: dict[str, Any]) -> Tensor:
        given = args["model"], [args["input_cond"]], args["input"], args["sigma"]
        return args["input"] - samplers.calc_cond_batch(*given, copy.deepcopy(kept))[0]

    patched = model.clone()
    patched.set_model_sampler_cfg_function(again)
    return patched


def _around_unet(model: Any, wrapper: Any) -> Any:
    patched = model.clone()
    kind = module("comfy.patcher_extension").WrappersMP.DIFFUSION_MODEL
    patched.add_wrapper_with_key(kind, "other", wrapper)
    return patched


def second_pass(scene: Scene, model: Any) -> Any:
    """Runs the U-Net on another latent before each pass (reference-only control), and throws that
    away."""

    def wrapper(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        executor(x.flip(-1) + 1, *args, **kwargs)
        return executor(x, *args, **kwargs)

    return _around_unet(model, wrapper)


def more_keys(scene: Scene, model: Any) -> Any:
    """Self-attention over more than a block's own tokens: all of them turned over as well."""

    def patch(q: Tensor, k: Tensor, v: Tensor, options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return q, torch.cat((k, 2 * k.flip(1)), dim=1), torch.cat((v, v.flip(1)), dim=1)

    patched = model.clone()
    patched.set_model_attn1_patch(patch)
    return patched


def nag(scene: Scene, model: Any, scale: float = 4.0) -> Any:
    """Text states of more rows than the latent has, which each attn2 takes apart in a forward of
    its own (NAG). ``scale`` 1 changes nothing."""
    negative = scene.text("a kite")[0][0]
    unet = model.model.diffusion_model
    blocks = [unet.get_submodule(site.ldm).attn2 for site in scene.mini.anystory.model.sites]

    def apart(forward: Any) -> Any:
        def attend(x: Tensor, context: Tensor, value: Any = None, **options: Any) -> Tensor:
            own = forward(x, context=context[: x.shape[0]], **options)
            others = context[x.shape[0] :].expand_as(context[: x.shape[0]])
            return own * scale - forward(x, context=others, **options) * (scale - 1)

        return attend

    def wrapper(executor: Any, x: Tensor, t: Tensor, context: Tensor, *args: Any, **kw: Any) -> Any:
        before = [block.forward for block in blocks]
        for block, forward in zip(blocks, before, strict=True):
            block.forward = apart(forward)
        try:
            return executor(x, t, torch.cat((context, negative.to(context))), *args, **kw)
        finally:
            for block in blocks:
                del block.forward

    return _around_unet(model, wrapper)


def tiles(scene: Scene, model: Any) -> Any:
    """A model function wrapper that runs the left and the right half on their own."""

    def wrapper(apply: Any, arguments: dict[str, Any]) -> Tensor:
        parts = arguments["input"].chunk(2, dim=-1)
        return torch.cat([apply(p, arguments["timestep"], **arguments["c"]) for p in parts], dim=-1)

    patched = model.clone()
    patched.set_model_unet_function_wrapper(wrapper)
    return patched


def batched_tiles(scene: Scene, model: Any) -> Any:
    """The same with both halves in one call, each with all its rows: ComfyUI-TiledDiffusion."""

    def wrapper(apply: Any, arguments: dict[str, Any]) -> Tensor:
        x, timestep = arguments["input"], arguments["timestep"]
        parts = torch.cat(x.chunk(2, dim=-1))
        repeated = {
            key: value.repeat(2, *(1 for _ in value.shape[1:]))
            if isinstance(value, Tensor)
            else value
            for key, value in arguments["c"].items()
        }
        return torch.cat(apply(parts, timestep.repeat(2), **repeated).chunk(2), dim=-1)

    patched = model.clone()
    patched.set_model_unet_function_wrapper(wrapper)
    return patched


def row_by_row(scene: Scene, model: Any) -> Any:
    """A wrapper that runs every batch row alone, as low-memory packs do."""

    def wrapper(apply: Any, arguments: dict[str, Any]) -> Tensor:
        x, c = arguments["input"], arguments["c"]
        chunks = arguments["cond_or_uncond"]
        size = x.shape[0] // len(chunks)
        out = []
        for row in range(x.shape[0]):
            options = {
                **c["transformer_options"],
                "cond_or_uncond": [chunks[row // size]],
                "uuids": [c["transformer_options"]["uuids"][row // size]],
            }
            own = {
                k: v[row : row + 1] if isinstance(v, Tensor) and v.shape[:1] == x.shape[:1] else v
                for k, v in c.items()
            }
            own["transformer_options"] = options
            out.append(apply(x[row : row + 1], arguments["timestep"][row : row + 1], **own))
        return torch.cat(out)

    patched = model.clone()
    patched.set_model_unet_function_wrapper(wrapper)
    return patched


PATCHES: dict[str, Patch] = {
    "LoRA": lora,
    "IP-Adapter, triple keys": ip_adapter_triples,
    "IP-Adapter, pair keys": ip_adapter_pairs,
    "attn1 replacement": attn1_replacement,
    # The mini model's middle block, with 16 tokens, says little: the node's largest scale.
    "PAG": _extra("pag", "PerturbedAttentionGuidance", scale=100.0),
    "SAG": _extra("sag", "SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    "FreeU": _extra("freelunch", "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    "HyperTile": _extra(
        "hypertile", "HyperTile", tile_size=32, swap_size=2, max_depth=2, scale_depth=False
    ),
    "token merging": token_merge,
    "DeepShrink": _extra(
        "model_downscale",
        "PatchModelAddDownscale",
        block_number=3,
        downscale_factor=2.0,
        start_percent=0.0,
        end_percent=1.0,
        downscale_after_skip=True,
        downscale_method="bicubic",
        upscale_method="bicubic",
    ),
    "Attention Couple": attention_couple,
    "more keys": more_keys,
    "NAG": nag,
    "tiling wrapper": tiles,
    "batched tiles": batched_tiles,
}
