"""Every sampler of the host, whatever it asks of the model: subjects act at each level of noise."""

from __future__ import annotations

import pytest
import torch
from scene import Scene, halves, module

from devkit import environment


def samplers() -> list[str]:
    """Names of the host's samplers, read without loading it."""
    source = (environment.prepare_host() / "comfy" / "samplers.py").read_text(encoding="utf-8")
    start = source.index("KSAMPLER_NAMES = [")
    listed = source[source.index("[", start) + 1 : source.index("]", start)]
    return [name.strip().strip("\"'") for name in listed.split(",")] + [
        "ddim",
        "uni_pc",
        "uni_pc_bh2",
    ]


@pytest.fixture(scope="module")
def routed(scene: Scene) -> object:
    """Two subjects, each in its half of the picture."""
    return scene.route(mode="masks", masks=halves())


@pytest.mark.parametrize("name", samplers())
def test_a_sampler(scene: Scene, routed: object, name: str) -> None:
    """At every level that it asks for, each block routes by the masks; a run without subjects is
    the host's own, to the bit."""
    given = {"sampler_name": name, "steps": 3, "latent_image": scene.latent(64, 64)}
    model, maps = scene.apply_with_maps(routing=routed)
    out = scene.sample(model, **given)
    plain = scene.sample(scene.mini.model, **given)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, plain, rtol=0.01, atol=0.01)
    record = maps.find(out).record
    steps = {level.step for level in record.levels}
    assert record.steps == 3 and {0} <= steps <= {0, 1, 2}
    for level in record.levels:
        assert list(level.ids) == [site.index for site in record.sites]
        for index, ids in level.ids.items():
            height, width = level.grids[index]
            left = ids.reshape(height, width)[:, : width // 2]
            right = ids.reshape(height, width)[:, width // 2 :]
            assert bool((left == 0).all()) and bool((right == 1).all())
    idle = scene.apply(routing=routed, strength=0.0, reference_strength=0.0)
    assert torch.equal(scene.sample(idle, **given), plain)


def test_the_list_is_the_hosts(scene: Scene) -> None:
    known = set(module("comfy.samplers").SAMPLER_NAMES)
    assert set(samplers()) == known and len(known) >= 42
