"""One core, two hosts: ComfyUI's U-Net and diffusers', with the same weights, predict the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scene import module


@pytest.fixture(scope="module")
def twin(mini: Any) -> Any:
    """The mini U-Net in diffusers, and the slot of our processors."""
    names = module("anystory_pack.anystory_core.bases.sdxl.names")
    sizes = module("anystory_pack.anystory_core.training.hosts.sizes")
    hosts = module("anystory_pack.anystory_core.training.hosts.unet")
    config = mini.anystory.model.config
    unet = module("diffusers").UNet2DConditionModel(**sizes.diffusers_unet_config(config.unet))
    table = names.ldm_to_diffusers(config)
    state = mini.model.model.diffusion_model.state_dict()
    unet.load_state_dict({table[name]: x.float() for name, x in state.items()}, strict=True)
    unet.eval().requires_grad_(False)
    return unet, hosts.install(unet, mini.anystory.model.sites)


@pytest.mark.parametrize("size", [(16, 16), (13, 22)])
@pytest.mark.parametrize(("subjects", "agree"), [(0, False), (1, False), (3, False), (3, True)])
def test_the_same_prediction(
    scene: Any, mini: Any, twin: Any, subjects: int, agree: bool, size: tuple[int, int], way: str
) -> None:
    core = "anystory_pack.anystory_core"
    calls, prepare = module(f"{core}.injection.call"), module(f"{core}.injection.prepare")
    modes, row_roles = module(f"{core}.routing.modes"), module(f"{core}.injection.rows")
    hosts = module(f"{core}.training.hosts.unet")
    patcher = module("anystory_pack.nodes.host.sdxl.patcher")
    model, config = mini.anystory.model, mini.anystory.model.config
    generator = torch.Generator().manual_seed(subjects)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    latents, text = draw(3, 4, *size), draw(3, 77, config.unet.context_dim)
    pooled = draw(3, config.unet.adm_channels - 6 * 256)
    timesteps = torch.tensor([10.0, 500.0, 990.0])
    time_ids = hosts.time_ids(256, 192, 3, latents.device)

    def call(attention: Any) -> Any:
        if not subjects:
            return None
        chosen = [s.map(lambda x: x.float()) for s in scene.subjects[:subjects]]
        source = modes.build_source("learned", model, chosen, [None] * subjects)
        settings = prepare.Settings()
        prepared = prepare.prepare_subjects(model, chosen, source, settings, agree=agree)
        rows = row_roles.Rows((0, 2), (1,))
        return calls.Call(prepared, rows, (True,) * subjects, model.sites, attention)

    unet, slot = twin
    inputs = hosts.UNetInputs(latents, timesteps, text, pooled, time_ids)
    ours = hosts.predict(unet, slot, call(hosts.dense_attention), inputs)
    table = patcher.BlockTable(model.sites)
    options = patcher.installed({}, table, mini.model.model.diffusion_model, late=False)
    options[scene.ids.CALL_KEY] = call(patcher.RoutedAttention(options))
    size_label = torch.cat(
        [
            module("comfy.ldm.modules.diffusionmodules.util").timestep_embedding(
                time_ids[:, i], 256
            )
            for i in range(6)
        ],
        dim=1,
    )
    theirs = mini.model.model.diffusion_model(
        latents, timesteps, context=text, y=torch.cat((pooled, size_label), dim=1),
        transformer_options=options,
    )  # fmt: skip
    error = (ours - theirs).norm() / theirs.norm()
    assert error < 1e-4, float(error)
    if subjects:
        plain = hosts.predict(unet, slot, None, inputs)
        assert (ours - plain).norm() / plain.norm() > 1e-3  # else nothing was compared


def test_the_same_references_at_matched_noise(scene: Any, mini: Any, twin: Any) -> None:
    """Both hosts read the same keys and values from the same noised pictures."""
    core = "anystory_pack.anystory_core"
    matched, hosts = module(f"{core}.injection.matched"), module(f"{core}.training.hosts.unet")
    patcher = module("anystory_pack.nodes.host.sdxl.patcher")
    sites, config = mini.anystory.model.sites, mini.anystory.model.config
    generator = torch.Generator().manual_seed(1)
    pictures = [
        matched.Picture(
            0,
            torch.randn(4, 24, 24, generator=generator),
            torch.randn(77, config.unet.context_dim, generator=generator),
            torch.randn(config.unet.pooled_dim, generator=generator),
            torch.rand(24, 24, generator=generator).round(),
        )
        for _ in range(2)
    ]
    references = matched.MatchedReferences(
        tuple(pictures), sites, 1, config.unet.context_dim, config.unet.pooled_dim
    )
    time_ids = hosts.time_ids(256, 192, 2, torch.device("cpu"))
    embed = module("comfy.ldm.modules.diffusionmodules.util").timestep_embedding
    size_label = torch.cat([embed(time_ids[:, i], 256) for i in range(6)], dim=1)
    unet, slot = twin

    def ours(given: Any, reading: Any) -> None:
        noisy = given.latents + given.noise
        inputs = hosts.UNetInputs(
            noisy, torch.full((2,), 500.0), given.text, given.pooled, time_ids
        )
        hosts.predict(unet, slot, reading, inputs)

    def theirs(given: Any, reading: Any) -> None:
        table = patcher.BlockTable(sites)
        model = mini.model.model.diffusion_model
        options = {
            **patcher.installed({}, table, model, late=False), scene.ids.CALL_KEY: reading,
        }  # fmt: skip
        y = torch.cat((given.pooled, size_label), dim=1)
        model(
            given.latents + given.noise, torch.full((2,), 500.0), context=given.text, y=y,
            transformer_options=options,
        )  # fmt: skip

    found = [references.read(1.0, forward, at_once=2) for forward in (ours, theirs)]
    assert sorted(found[0]) == sorted(found[1]) == [site.index for site in sites[1:]]
    for index, part in found[0].items():
        for one, other in zip(part, found[1][index], strict=True):
            if one is None:
                assert other is None
                continue
            for a, b in ((one.k, other.k), (one.v, other.v)):
                assert a.shape == b.shape and (a - b).norm() / b.norm() < 1e-4
