"""The host's own Flux with our patches against the naive transcription, in float32."""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import flux_host
import flux_scene as scene
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from anystory_core.bases.flux import call as flux_call
from anystory_core.bases.flux.call import RowGroup


@pytest.fixture(scope="module", autouse=True)
def _glue(pack: ModuleType) -> None:
    importlib.import_module(f"{pack.__name__}.host.flux.patches")


@pytest.fixture(scope="module")
def net(pack: ModuleType) -> Any:
    return flux_host.tiny_flux()


@pytest.fixture(scope="module")
def model() -> Any:
    return scene.tiny_model()


@st.composite
def drawn(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 4))
    return {
        "seed": draw(st.integers(0, 10**6)),
        "views": [draw(st.integers(1, 2)) for _ in range(count)],
        "concept": draw(st.booleans()),
        "gamma": draw(st.sampled_from([0.0, 0.0, -0.5, -math.inf])),
        "mode": draw(st.sampled_from(["open", "router", "masks", "router within masks"])),
        "size": (draw(st.integers(2, 13)), draw(st.integers(2, 13))),
        "text": draw(st.integers(1, 7)),
        "rows": draw(st.sampled_from([(1, 0), (1, 1), (2, 0), (2, 1)])),
    }


@pytest.mark.parametrize("least", [1, 10**9], ids=["by region", "masked"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(drawn())
def test_forward(pack: ModuleType, net: Any, model: Any, least: int, case: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux_call, "LEAST_SORTED", least)
        compare(pack, net, model, **case)


def compare(
    pack: ModuleType, net: Any, model: Any, *, seed: int, views: list[int], concept: bool,
    gamma: float, mode: str, size: tuple[int, int], text: int, rows: tuple[int, int],
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    grid = -(-size[0] // 2), -(-size[1] // 2)
    cond, batch = rows[0], sum(rows)
    subjects = [scene.subject(generator, v, concept=concept, gamma=gamma) for v in views]
    _, t, context, pooled, guidance = (
        x.float() for x in scene.inputs(generator, batch, text, grid)
    )
    x = torch.randn(batch, scene.CONFIG.transformer.channels, *size, generator=generator)
    pooled[:cond] = pooled[0].clone()
    found = None
    if gamma > -math.inf:
        found = scene.references(net, model, subjects, guidance[:1], pooled[:1])
    groups = [RowGroup(tuple(range(cond)), True, found)]
    if batch > cond:
        groups.append(RowGroup(tuple(range(cond, batch)), False))
    count, tokens = len(subjects), grid[0] * grid[1]
    regions = torch.randint(0, count + 1, (cond, tokens), generator=generator)
    allowed = torch.rand(cond, count, tokens, generator=generator) < 0.6
    routed = mode.startswith("router")
    call, concepts = scene.call_of(
        model,
        subjects,
        text,
        grid,
        tuple(groups),
        regions=regions if mode == "masks" else None,
        router=scene.router(model, subjects) if routed else None,
        allowed=allowed if mode == "router within masks" else None,
    )
    out = flux_host.run(pack, net, x, t, concepts.behind(context), pooled, guidance, call)
    naive = scene.naive_of(net, model)
    for row in range(batch):
        acts = row < cond
        expected = naive.forward(
            scene.tokens_of(x[row]),
            grid,
            float(t[row]),
            context[row],
            pooled[row],
            float(guidance[row]),
            scene.people(subjects) if acts else [],
            router=routed and acts,
            regions=regions[row] if mode == "masks" and acts else None,
            allowed=allowed[row] if mode == "router within masks" and acts else None,
        )
        assume(expected.margin > 1e-4)
        wanted = scene.latent_of(expected.tokens, *size)
        assert (out[row] - wanted).norm() / wanted.norm() < 1e-4
