"""Redux embedders, low-rank branches, pictures and sizes of FLUX, each against plain words."""

from __future__ import annotations

import dataclasses
import math

import flux_scene as scene
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anystory_core.bases.flux.config import FluxConfig, FluxTransformerConfig, WindowConfig
from anystory_core.bases.flux.low_rank import Branch
from anystory_core.bases.flux.model import build_model
from anystory_core.bases.flux.redux import ReduxEmbedder
from anystory_core.bases.flux.sites import build_sites
from anystory_core.errors import ConfigError
from anystory_core.subject.flux import prepare_flux_views


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), grid=st.integers(1, 4), share=st.sampled_from([0.0, 0.1, 1.0]))
def test_redux(seed: int, grid: int, share: float) -> None:
    """Cell by cell: the gate's weighted mean of its patches, 0 where the mask touches none."""
    torch.manual_seed(seed)
    embedder = ReduxEmbedder(scene.CONFIG, grid=grid, dtype=torch.float64)
    side = scene.CONFIG.vision.grid
    states = torch.randn(2, side * side, scene.CONFIG.vision.width, dtype=torch.float64)
    inside = torch.rand(2, side * side) < share
    out = embedder(states, inside)
    w = {name: x.detach() for name, x in embedder.state_dict().items()}
    for v in range(2):
        u = states[v] @ w["redux_up.weight"].T + w["redux_up.bias"]
        u += states[v] @ (w["up_branch.up.0.weight"] @ w["up_branch.down.weight"]).T
        h = u + w["up_branch.up.0.bias"]
        h = h * torch.sigmoid(h)
        z = (
            h
            @ (
                w["redux_down.weight"] + w["down_branch.up.0.weight"] @ w["down_branch.down.weight"]
            ).T
        )
        z = z + w["redux_down.bias"] + w["down_branch.up.0.bias"]
        g = torch.sigmoid(z @ w["gate.weight"][0] + w["gate.bias"])
        for cell in range(grid * grid):
            rows, columns = (
                range(i * side // grid, math.ceil((i + 1) * side / grid))
                for i in divmod(cell, grid)
            )
            patches = [y * side + x for y in rows for x in columns]
            weight = g[patches].mean()
            mean = (g[patches, None] * z[patches]).mean(0) / (weight + 1e-6)
            expected = mean if inside[v, patches].any() else torch.zeros_like(mean)
            assert torch.allclose(out[v, cell], expected, atol=1e-9)


def test_a_branch_is_the_same_added_in_place() -> None:
    torch.manual_seed(0)
    branch = Branch(6, [4, 3, 5], rank=2, bias=True)
    x, out = torch.randn(2, 7, 6), torch.randn(2, 7, 12)
    expected = out + branch(x)
    assert torch.allclose(branch.add(out.clone(), x), expected)
    dense = torch.cat(
        [up.weight @ a for up, a in zip(branch.up, branch.down.weight.chunk(3), strict=True)]
    )
    bias = torch.cat([up.bias for up in branch.up])
    assert torch.allclose(branch(x), x @ dense.T + bias, atol=1e-6)


def test_sites() -> None:
    sites = build_sites(FluxTransformerConfig())
    assert [site.index for site in sites] == list(range(1, 58))
    assert [sites[i].label for i in (0, 18, 19, 56)] == [
        "double 0", "double 18", "single 0", "single 37",
    ]  # fmt: skip
    assert [sites[i].short_label for i in (3, 20)] == ["d3", "s1"]
    assert sites[19].slot == ("single_block", 0) and sites[19].host == "single_blocks.0"
    assert sites[19].diffusers == "single_transformer_blocks.0"


def test_sizes_of_the_release() -> None:
    """The numbers of parameters that the release must have (without biases of the adapters)."""
    config = FluxConfig()
    branches = dataclasses.replace(config.branches, reference_bias=False, router_bias=False)
    sizes = dataclasses.replace(config, branches=branches)
    model = build_model(sizes, device="meta")
    counts = {
        prefix: sum(p.numel() for p in module.parameters()) for prefix, module in model.modules()
    }
    assert counts["branches.reference"] == 128 * 3_621_952
    assert counts["branches.router"] == 128 * 3_625_984
    assert FluxConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "change",
    [
        lambda c: dataclasses.replace(c.transformer, heads=5),
        lambda c: dataclasses.replace(c.transformer, double_blocks=0),
        lambda c: dataclasses.replace(c.reference, size=100),
        lambda c: dataclasses.replace(c, reference=dataclasses.replace(c.reference, size=520)),
        lambda c: WindowConfig(concept_start=1.5),
        lambda c: WindowConfig(concept_scale=-1),
        lambda c: FluxConfig.from_json(c.to_json().replace('"family":"flux"', '"family":"sd3"')),
    ],
)
def test_sizes_check_themselves(change: object) -> None:
    with pytest.raises(ConfigError, match="got|expected"):
        change(FluxConfig())  # type: ignore[operator]


def test_pictures_as_the_authors_make_them() -> None:
    """A square crop, white outside, Pillow's filters, the mask to the nearest pixel."""
    config = scene.CONFIG
    torch.manual_seed(1)
    picture = torch.rand(1, 50, 50, 3)
    mask = torch.zeros(1, 50, 50)
    mask[:, 1:49, 1:49] = 1  # 48 pixels; 1.04 times that is the whole picture
    views = prepare_flux_views(picture, mask, config)
    white = torch.where(mask[0, ..., None] > 0, picture[0], torch.ones(()))
    pixels = Image.fromarray((white * 255).round().to(torch.uint8).numpy())
    for made, size, filter_ in (
        (views.vision, config.vision.image_size, Image.Resampling.BICUBIC),
        (views.vae, config.reference.size, Image.Resampling.LANCZOS),
    ):
        closed = Image.fromarray((mask[0] * 255).to(torch.uint8).numpy())
        inside = np.array(closed.resize((size, size), Image.Resampling.NEAREST)) > 0
        resized = np.array(pixels.resize((size, size), filter_)).astype("float32") / 127.5 - 1
        expected = torch.from_numpy(resized * inside[..., None]).movedim(-1, 0)
        assert torch.allclose(made[0], expected, atol=1e-5)
        assert (made[0][:, ~torch.from_numpy(inside)] == 0).all()
    assert views.inside.shape == (1, config.vision.grid**2)
    assert views.keep.shape == (1, config.reference_grid**2) and views.keep.all()


def test_a_mask_of_the_outside() -> None:
    """Turned over on request, or where it owns the border; the note says which."""
    config = scene.CONFIG
    picture = torch.rand(1, 50, 50, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 50, 50)
    mask[:, 10:40, 10:40] = 1
    wanted = prepare_flux_views(picture, mask, config)
    outside = 1 - mask
    for changes in ({"invert_mask": True}, {"mask_shows": "background"}, {"mask_shows": "auto"}):
        found = prepare_flux_views(picture, outside, config, **changes)
        assert torch.equal(found.vision, wanted.vision), changes
    assert not torch.equal(prepare_flux_views(picture, outside, config).vision, wanted.vision)
    assert any("border" in note for note in found.notes)
