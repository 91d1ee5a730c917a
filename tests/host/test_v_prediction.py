"""Bases that predict v, and on schedules that end in noise alone: subjects act in them as in one
that predicts the noise, by the host's own formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scene import Scene, module, picture
from torch import Tensor


def predicting(scene: Scene, kind: str, zsnr: bool = False) -> Any:
    """The mini model, read as one that predicts something else."""
    node = module("comfy_extras.nodes_model_advanced").ModelSamplingDiscrete
    return node().patch(scene.mini.model, kind, zsnr)[0]


def denoised(scene: Scene, model: Any, t: int, seen: Tensor) -> tuple[Tensor, float]:
    """What a model makes of the U-Net's input ``seen`` at timestep ``t``, and its noise level: one
    Euler step to 0, without guidance."""
    sampling = model.get_model_object("model_sampling")
    sigma = float(sampling.sigmas[t])
    # The host multiplies noise by sigma, and at the last timestep by sqrt(1 + sigma^2).
    noise = seen if t == 999 else seen * (1 + sigma**2) ** 0.5 / sigma
    out = module("comfy.sample").sample_custom(
        model,
        noise,
        1.0,
        module("comfy.samplers").sampler_object("euler"),
        torch.tensor([sigma, 0.0]),
        scene.positive,
        scene.positive,
        torch.zeros_like(noise),
        disable_pbar=True,
    )
    return out, sigma


@pytest.mark.parametrize("zsnr", [False, True])
@pytest.mark.parametrize("t", [500, 999])
def test_the_same_network_output_by_the_hosts_formula(scene: Scene, t: int, zsnr: bool) -> None:
    """Both models run one U-Net with the same subjects on the same input at the same timestep, so
    D = x - sigma F of the one gives F, and F gives the other's D."""
    seen = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    epsilon = scene.apply(predicting(scene, "eps"))
    velocity = scene.apply(predicting(scene, "v_prediction", zsnr))
    first, sigma = denoised(scene, epsilon, t, seen)
    second, other = denoised(scene, velocity, t, seen)
    output = ((1 + sigma**2) ** 0.5 * seen - first) / sigma
    wanted = (seen - other * output) / (1 + other**2) ** 0.5
    # Half of float32's digits are lost where D is the small difference of x and sigma F.
    torch.testing.assert_close(second, wanted, rtol=1e-3, atol=2e-3)
    plain, _ = denoised(scene, predicting(scene, "v_prediction", zsnr), t, seen)
    assert float((second - plain).norm() / plain.norm()) > 5e-3


def test_a_whole_picture_and_a_segmentation(scene: Scene) -> None:
    """From the first step, which is noise alone, to the last; windows and routes included."""
    model = predicting(scene, "v_prediction", True)
    patched, maps = scene.apply_with_maps(model, end=0.6)
    latent = scene.sample(patched, steps=4)
    assert bool(torch.isfinite(latent).all())
    record = maps.find(latent).record
    acted = [bool(level.active[0]) for level in record.levels]
    assert acted == [True, True, False, False]  # at timesteps 999, 666; not at 333, 0
    image, mask = picture(0)
    node = scene.pack.AnyStorySegment
    found = node.execute(
        model=model, vae=scene.mini.vae, image=image, routing=scene.route(scene.subjects[0]),
        noise=1.0, noises=1,
    ).args[0]  # fmt: skip
    assert found.shape == mask.shape and bool(torch.isfinite(found).all())


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_the_small_models_file_says_what_it_predicts(
    scene: Scene, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its marks are those that the host knows, and its U-Net's formulas are the host's for them."""
    core = "anystory_pack.anystory_core"
    weights = module(f"{core}.mini.weights")
    marks = module(f"{core}.bases.sdxl.prediction")
    prediction = marks.Prediction(kind, zero_snr=kind == "v")
    state = weights.read_tensors(weights.path("unet"))
    plain = {name: tensor for name, tensor in state.items() if name not in marks.MARKS}
    written = {**plain, **marks.marks_of_file(prediction)}
    module(f"{core}.tensor_files").save_tensors(tmp_path / "unet.safetensors", written, {})
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    assert marks.prediction_of_file(weights.marks("unet"), {}) == prediction
    loaded = module("anystory_pack.nodes.mini").load_unet()
    host = module("comfy.model_base")
    assert type(loaded.model) is host.SDXL
    wanted = host.ModelType.EPS if kind == "epsilon" else host.ModelType.V_PREDICTION
    assert loaded.model.model_type == wanted
    # By the schedule of zero terminal SNR the host's last sigma is 4500, by SDXL's own it is 14.6.
    last = float(loaded.get_model_object("model_sampling").sigma_max)
    assert (last > 1000) == (kind == "v")
    for name, tensor in loaded.model.diffusion_model.state_dict().items():
        assert torch.equal(tensor.cpu(), plain[name].to(tensor.dtype)), name
