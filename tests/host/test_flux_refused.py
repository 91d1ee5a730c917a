"""What FLUX weights refuse, each by name; and what SDXL weights refuse of FLUX."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import flux_parts
import pytest
import torch
from flux_scene import CONFIG
from flux_world import FluxWorld
from scene import picture


def said(flux: FluxWorld, words: str) -> Any:
    """An error of ours with these words."""
    return pytest.raises(flux.errors.AnyStoryError, match=words)


def test_families_do_not_mix(flux: FluxWorld, scene: Any, pack: ModuleType) -> None:
    with said(flux, "no blocks of FLUX's kind.*FLUX.1-dev"):
        flux.apply(model=scene.mini.model)
    with said(flux, "no transformer blocks of SDXL's kind"):
        scene.apply(model=flux.model)
    with said(flux, "'ball' was encoded for sdxl, the AnyStory weights are for flux"):
        flux.route(scene.subjects[0])
    with said(flux, "'ball' was encoded for flux, the AnyStory weights are for sdxl"):
        scene.route(flux.subjects[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 2 * CONFIG.transformer.channels + 1}, "Fill, Canny or Depth"),
        ({"depth": 1}, "double blocks 1, .* expect 2"),
        ({"depth_single_blocks": 4}, "single blocks 4"),
        ({"hidden_size": 64, "num_heads": 4}, "width 64"),
        ({"context_in_dim": 24}, "text width 24"),
    ],
)
def test_other_models_of_the_kind(flux: FluxWorld, changes: dict[str, Any], words: str) -> None:
    with said(flux, words):
        flux.apply(model=flux_parts.flux_patcher(**changes))


@pytest.mark.parametrize("kind", ["Flux2", "Chroma"])
def test_models_with_modulation_of_their_own(flux: FluxWorld, kind: str) -> None:
    """The host's own classes, at the sizes of the tiny model."""
    with said(flux, rf"model: {kind} modulates all blocks at once, .*FLUX\.1-dev"):
        flux.apply(model=flux_parts.other_patcher(kind))


def test_a_control_lora(flux: FluxWorld) -> None:
    """It makes the first layer take more channels when it is patched in, behind every check."""
    from comfy.patcher_extension import WrappersMP

    def more(executor: Any, x: torch.Tensor, *args: Any, **kw: Any) -> Any:
        return executor(torch.cat((x, x), dim=1), *args, **kw)

    model = flux.apply(flux.route(flux.subjects[0]))
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "control", more)
    with said(flux, "model: it takes 8 channels, .* expect 4: a control LoRA"):
        flux.sample(model)


@pytest.mark.parametrize("references", ["whole", "masked in the decoder", "matched noise"])
def test_references_beyond_the_mask(flux: FluxWorld, references: str) -> None:
    with said(flux, f"references: got '{references}'; on FLUX"):
        flux.apply(references=references)
    flux.apply(references="masked")


def test_schnell_gets_a_line_in_the_log(flux: FluxWorld, caplog: pytest.LogCaptureFixture) -> None:
    flux.apply(model=flux_parts.flux_patcher(guidance_embed=False))
    assert "no guidance" in caplog.text and "schnell" in caplog.text


def test_another_scale_of_latents(flux: FluxWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flux.model.model.latent_format, "scale_factor", 1.5)
    with said(flux, r"scale and shift \(1.5"):
        flux.apply()


def test_reference_latents_of_kontext(flux: FluxWorld) -> None:
    import node_helpers

    kontext = node_helpers.conditioning_set_values(
        flux.prompt(1), {"reference_latents": [flux.latent()["samples"]]}
    )
    with said(flux, "reference latents"):
        flux.sample(flux.apply(), positive=kontext)


def test_another_vision_encoder(flux: FluxWorld, scene: Any) -> None:
    with said(flux, "sigclip_vision_patch14_384"):
        flux.encode(0, clip_vision=scene.mini.clip_vision)
    with said(flux, "width, layers, picture size"):
        flux.encode(0, clip_vision=flux_parts.siglip(num_hidden_layers=2))
    image, mask = picture(0)
    with said(flux, "clip_vision: got width"):
        scene.encode_picture(image, mask=mask, clip_vision=flux.clip_vision)


class Vae:
    """Gives latents of some shape."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def encode(self, picture: torch.Tensor) -> torch.Tensor:
        return torch.zeros(picture.shape[0], *self.shape)


@pytest.mark.parametrize("shape", [(16, 8, 8), (4, 4, 4)])
def test_another_vae(flux: FluxWorld, shape: tuple[int, ...]) -> None:
    with said(flux, "FLUX's VAE"):
        flux.encode(0, vae=Vae(*shape))


def test_modes(flux: FluxWorld) -> None:
    for mode in ("text", "text within masks"):
        with said(flux, "does not have"):
            flux.route(mode=mode)
    with said(flux, r"mask of subject \[2\] is missing"):
        flux.route(mode="masks", masks=flux.halves()[:1])
    with said(flux, "subject_9: unknown input"):
        flux.route(*[flux.subjects[0]] * 9)


def test_no_router_in_the_file(flux: FluxWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flux.anystory.model, "router_branches", None)
    with said(flux, "hold no router"):
        flux.route()
    flux.route(flux.subjects[0])
    flux.route(mode="masks", masks=flux.halves())


def test_segmentation(flux: FluxWorld, pack: ModuleType) -> None:
    with said(flux, "has no background"):
        pack.AnyStorySegment.execute(
            model=flux.model, vae=flux.vae, image=picture(0)[0], routing=flux.route()
        )


def test_bad_timing(flux: FluxWorld) -> None:
    with said(flux, "concept_start"):
        flux.apply(concept_start=0.5, concept_end=0.2)
    with said(flux, "timing: got 1.5"):
        flux.apply(reference_start=1.5)
    with said(flux, "mask of picture 1 is empty"):
        flux.encode(0, mask=torch.zeros(1, 32, 32))
