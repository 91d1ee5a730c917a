"""Bad input: each message names the node, the input, the value and what to do; the host goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scene import Scene, halves, module, picture

Case = tuple[Callable[[Scene], Any], str]


def subject_with(**inputs: Any) -> Callable[[Scene], Any]:
    def act(scene: Scene) -> Any:
        given = {"image": picture(0)[0], "mask": picture(0)[1], **inputs}
        return scene.encode_picture(given.pop("image"), **given)

    return act


def options_with(**values: float) -> Callable[[Scene], Any]:
    given = {"strength": 1.0, "reference_strength": 1.0, "start": 0.0, "end": 1.0, **values}
    return lambda s: s.pack.AnyStorySubjectOptions.execute(s.subjects[0], **given)


def without(scene: Scene, *parts: str) -> Any:
    """The mini model as a file without some parts would give it."""
    build = module("anystory_pack.anystory_core.weights.model")
    managed = module("anystory_pack.nodes.host.managed")
    kept = [part for part in build.PARTS if part not in parts]
    config = scene.mini.anystory.model.config
    model = build.build_model(config, kept, operations=managed.OPERATIONS)
    source = scene.mini.anystory.model.state_dict()
    for prefix, inner in model.modules():
        inner.load_state_dict({k: source[f"{prefix}.{k}"] for k in inner.state_dict()})
    model.fingerprint = scene.mini.anystory.model.fingerprint
    return managed.ManagedAnyStory(model, "partial")


def route_with(scene: Scene, anystory: Any, *subjects: Any, **inputs: Any) -> Any:
    given = {f"subject_{i}": s for i, s in enumerate(subjects, 1)}
    return scene.pack.SubjectRouter.execute(
        anystory=anystory, **{"mode": "learned", **given, **inputs}
    )[0]


def no_router(scene: Scene) -> Any:
    return route_with(scene, without(scene, "routers"), *scene.subjects[:2])


def host_model(kind: str, **sizes: Any) -> Callable[[Scene], Any]:
    """ApplyAnyStory on another family of the host's models, small."""

    def act(scene: Scene) -> Any:
        supported = module("comfy.supported_models")
        given = {**getattr(supported, kind).unet_config, **sizes}
        if kind == "Flux":  # newer hosts ask for one thing more
            known = module("comfy.ldm.flux.model").FluxParams.__dataclass_fields__
            given |= {name: [] for name in ("txt_ids_dims",) if name in known}
        settings = getattr(supported, kind)(given)
        settings.set_inference_dtype(torch.float32, None)
        model = settings.get_model({}, "", device="meta")
        patcher = module("comfy.model_patcher").ModelPatcher(
            model, load_device=torch.device("cpu"), offload_device=torch.device("cpu")
        )
        return scene.apply(patcher)

    return act


UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "use_spatial_transformer": True,
    "legacy": False,
    "model_channels": 32,
    "transformer_depth": [0, 0, 2, 2, 1, 1],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 32,
}
FLUX = {
    "image_model": "flux",
    "guidance_embed": True,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 32,
    "context_in_dim": 32,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
}

NOISY = picture(0)[0].clone()
NOISY[0, 3, 4, 1] = float("nan")


def vae_with(channels: int, side: int) -> Any:
    return SimpleNamespace(encode=lambda x: torch.zeros(x.shape[0], channels, side, side))


def clip_vision_of(width: int) -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(
            vision_model=SimpleNamespace(
                embeddings=SimpleNamespace(class_embedding=torch.zeros(width)),
                encoder=SimpleNamespace(layers=[0] * 24),
            )
        ),
        image_size=224,
    )


CASES: dict[str, Case] = {
    "picture of 2 channels": (
        subject_with(image=torch.rand(1, 20, 20, 2)),
        r"EncodeSubject: image: got shape \(1, 20, 20, 2\).*1, 3 or 4 channels",
    ),
    "NaN picture": (subject_with(image=NOISY), "EncodeSubject: image: it has NaN"),
    "NaN mask": (
        subject_with(mask=torch.full((1, 96, 96), float("nan"))),
        "EncodeSubject: mask: it has NaN",
    ),
    "empty mask": (
        subject_with(mask=torch.zeros(1, 96, 96)),
        "EncodeSubject: mask: the mask of picture 1 is empty.*invert_mask",
    ),
    "mask of another shape": (
        subject_with(mask=torch.ones(1, 20, 90)),
        "EncodeSubject: mask: got 90x20 for a picture of 96x96",
    ),
    "two masks for one picture": (
        subject_with(mask=torch.ones(2, 96, 96)),
        r"EncodeSubject: mask: got shape \(2, 96, 96\)",
    ),
    "VAE with other channels": (
        subject_with(vae=vae_with(16, 32)),
        r"EncodeSubject: vae: it gives latents of shape \(16, 32, 32\).*load the VAE",
    ),
    "VAE with another stride": (
        subject_with(vae=vae_with(4, 64)),
        r"EncodeSubject: vae: it gives latents of shape \(4, 64, 64\)",
    ),
    "wrong CLIP vision": (
        subject_with(clip_vision=clip_vision_of(1024)),
        r"EncodeSubject: clip_vision: got width.*\(1024, 24, 224\).*load the CLIP vision",
    ),
    "CLIP vision of another kind": (
        subject_with(clip_vision=SimpleNamespace(model=SimpleNamespace())),
        "EncodeSubject: clip_vision: .*load the CLIP vision",
    ),
    "start after end, one subject": (
        options_with(start=0.8, end=0.2),
        "AnyStorySubjectOptions: start: got 0.8, after end = 0.2",
    ),
    "start after end, overall": (
        lambda s: s.apply(start=0.8, end=0.2),
        "ApplyAnyStory: start: got 0.8, after end = 0.2",
    ),
    "negative strength": (
        options_with(strength=-1.0),
        "AnyStorySubjectOptions: strength: got -1.0, expected a number of 0 or more",
    ),
    "infinite strength": (
        lambda s: s.apply(reference_strength=float("inf")),
        "ApplyAnyStory: reference_strength: got inf",
    ),
    "nine subjects": (
        lambda s: s.route(*[s.subjects[0]] * 9),
        "SubjectRouter: subject_9: unknown input; .*subject_1 to subject_8",
    ),
    "several subjects and no router": (no_router, "SubjectRouter: .*needs for 2 subjects; .*mask"),
    "one subject, its mask and no router": (
        lambda s: route_with(
            s, without(s, "routers"), s.subjects[0], mode="learned within masks", mask_1=halves()[0]
        ),
        "SubjectRouter: .*needs for 1 subject; .*mask",
    ),
    "a mask is missing": (
        lambda s: s.route(mode="masks", masks=halves()[:1]),
        r"SubjectRouter: .*the mask of subject \[2\] is missing; connect one mask for each",
    ),
    "other numbers of masks": (
        lambda s: s.route(mode="masks", masks=[torch.ones(3, 8, 8), torch.ones(2, 8, 8)]),
        "SubjectRouter: masks: one subject has 2 masks and another 3",
    ),
    "masks for another batch": (
        lambda s: s.sample(
            s.apply(routing=s.route(mode="masks", masks=[torch.ones(3, 8, 8)] * 2)),
            latent_image=s.latent(batch=2),
        ),
        "ApplyAnyStory: masks: subject 1 has 3 masks, the batch has 2 pictures; give it one mask",
    ),
    "a mask of other axes": (
        lambda s: s.route(mode="masks", masks=[torch.ones(2, 3, 8, 8)] * 2),
        r"SubjectRouter: mask_1: got shape \(2, 3, 8, 8\), expected \(height, width\), or",
    ),
    "unknown mode": (
        lambda s: s.route(mode="guess"),
        "SubjectRouter: mode: got 'guess', expected one of",
    ),
    "a second Apply": (
        lambda s: s.apply(s.apply()),
        "ApplyAnyStory: model: it already went through an ApplyAnyStory.*SubjectRouter",
    ),
    "SD 1.5": (
        host_model("SD15", **{**UNET, "context_dim": 64, "adm_in_channels": None}),
        "ApplyAnyStory: model: .* has (width|heads|text width) .* at block .*expect.*load a check",
    ),
    "SDXL refiner": (
        host_model(
            "SDXLRefiner",
            **{
                **UNET,
                "num_res_blocks": [2, 2, 2, 2],
                "channel_mult": [1, 2, 4, 4],
                "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
                "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
                "transformer_depth_middle": 4,
                "context_dim": 64,
                "num_classes": "sequential",
                "adm_in_channels": 2560,
            },
        ),
        r"ApplyAnyStory: model: SDXLRefiner has \d+ transformer blocks.*expect 16; load a check",
    ),
    "FLUX": (
        host_model("Flux", **FLUX),
        "ApplyAnyStory: model: Flux has no transformer blocks of SDXL's kind.*load a checkpoint",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(scene: Scene, name: str) -> None:
    act, message = CASES[name]
    with pytest.raises(scene.errors.AnyStoryError, match=message):
        act(scene)


def test_the_host_goes_on_after_every_refusal(scene: Scene) -> None:
    before = scene.sample(scene.apply())
    for act, _ in CASES.values():
        with pytest.raises(scene.errors.AnyStoryError):
            act(scene)
    assert torch.equal(scene.sample(scene.apply()), before)


def other_widths(scene: Scene, **unet: Any) -> Any:
    """Weights and subjects of a model family with another U-Net."""
    build = module("anystory_pack.anystory_core.weights.model")
    managed = module("anystory_pack.nodes.host.managed")
    config = scene.mini.anystory.model.config
    shape = dataclasses.replace(config.unet, **unet)
    former = dataclasses.replace(config.subject_qformer, output_dim=shape.context_dim)
    config = dataclasses.replace(config, name="other", unet=shape, subject_qformer=former)
    model = build.build_model(config, operations=managed.OPERATIONS, device="meta")
    model.fingerprint = scene.subjects[0].fingerprint
    return managed.ManagedAnyStory(model, "other")


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        (
            {"model_channels": 32},
            r"has width \d+ at block 'input 4.0', these .*'other'.* expect 32",
        ),
        ({"head_dim": 64}, "has heads 2 at block 'input 4.0', these .* expect 1"),
        ({"context_dim": 512}, "has text width 256 at block '.*', these .* expect 512"),
        ({"transformer_depth": (0, 1, 1)}, r"has 16 transformer blocks, these .* expect \d+"),
    ],
)
def test_weights_of_other_sizes(scene: Scene, unet: Any, message: str) -> None:
    routing = route_with(scene, other_widths(scene, **unet), *scene.subjects[:2])
    with pytest.raises(scene.errors.ModelMismatchError, match=f"ApplyAnyStory: model: .*{message}"):
        scene.apply(routing=routing)


def test_a_subject_of_other_weights(scene: Scene) -> None:
    stranger = dataclasses.replace(scene.subjects[0], fingerprint="0123abcd")
    with pytest.raises(scene.errors.ModelMismatchError, match="SubjectRouter: subject 'ball' was"):
        scene.route(stranger, scene.subjects[1])


def test_a_model_swapped_after_apply_is_refused_when_it_samples(scene: Scene) -> None:
    """Other packs replace the model inside a patched one; sampling checks again."""
    model = scene.apply()
    config = scene.mini.anystory.model.config
    wrong = dataclasses.replace(config.reference, latent_scale=0.5)
    wrapper = model.get_wrappers("outer_sample", scene.ids.WRAPPER_KEY)[0]
    routing = wrapper.routing
    other = dataclasses.replace(config, reference=wrong)
    anystory = SimpleNamespace(
        model=SimpleNamespace(config=other, sites=routing.anystory.model.sites)
    )
    swapped = dataclasses.replace(wrapper, routing=dataclasses.replace(routing, anystory=anystory))
    model.remove_wrappers_with_key("outer_sample", scene.ids.WRAPPER_KEY)
    model.add_wrapper_with_key("outer_sample", scene.ids.WRAPPER_KEY, swapped)
    with pytest.raises(scene.errors.ModelMismatchError, match="scale and shift"):
        scene.sample(model)


def test_partial_files_are_used_for_what_they_hold(scene: Scene) -> None:
    """No router: one subject. No ReferenceNet: CLIP tokens alone. No CLIP: references alone."""
    whole = scene.sample(scene.apply(routing=scene.route(scene.subjects[0])))
    seen = [whole]
    for parts in (
        ("routers", "routing_encoder"),
        ("reference_net", "reference_projections"),
        ("subject_encoder", "clip_projections", "routers", "routing_encoder"),
    ):
        anystory = without(scene, *parts)
        subject = scene.encode(0, anystory=anystory, label="ball")
        out = scene.sample(scene.apply(routing=route_with(scene, anystory, subject)))
        assert torch.isfinite(out).all()
        assert all(not torch.allclose(out, other, rtol=0.01, atol=0.01) for other in seen)
        seen.append(out)
