"""The whole forward of FLUX with subjects against a naive transcription, in float64."""

from __future__ import annotations

import math

import flux_scene as scene
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anystory_core.bases.flux import call as flux_call
from anystory_core.bases.flux.call import RowGroup

MODEL, NET = scene.tiny_model(), scene.tiny_net().double()
for _, module in MODEL.modules():
    module.double()
NAIVE = scene.naive_of(NET, MODEL)
EXACT = 1e-7  # sines of the time embedding are float32: they depend on the size of the batch


@st.composite
def drawn(draw: st.DrawFn) -> dict[str, object]:
    count = draw(st.integers(1, 4))
    return {
        "seed": draw(st.integers(0, 10**6)),
        "views": [draw(st.integers(1, 2)) for _ in range(count)],
        "concepts": [draw(st.booleans()) for _ in range(count)],
        "gammas": [draw(st.sampled_from([0.0, 0.0, -0.7, 0.4, -math.inf])) for _ in range(count)],
        "references": draw(st.booleans()),
        "mode": draw(st.sampled_from(["open", "router", "masks", "router within masks"])),
        "grid": (draw(st.integers(1, 6)), draw(st.integers(1, 7))),
        "text": draw(st.integers(1, 7)),
        "rows": draw(st.sampled_from([(1, 0), (1, 1), (2, 0), (2, 1), (3, 2)])),
        "turned": draw(st.booleans()),
    }


def run(case: dict[str, object]) -> None:
    """Compare every row of one call with the naive transcription of that row."""
    generator = torch.Generator().manual_seed(case["seed"])
    grid, text, mode = case["grid"], case["text"], case["mode"]
    cond, plain = case["rows"]
    rows, size = cond + plain, grid[0] * grid[1]
    subjects = [
        scene.subject(generator, views, concept=concept, gamma=gamma)
        for views, concept, gamma in zip(
            case["views"], case["concepts"], case["gammas"], strict=True
        )
    ]
    if not case["references"]:
        for each in subjects:
            each.gamma = -math.inf
    tokens, t, context, pooled, guidance = scene.inputs(generator, rows, text, grid)
    order = list(range(rows))
    acting, idle = order[:cond], order[cond:]
    if case["turned"]:
        idle, acting = order[:plain], order[plain:]
    pooled[acting] = pooled[acting[0]].clone()  # one prompt
    found = None
    if any(s.gamma > -math.inf for s in subjects):
        first = acting[0]
        found = scene.references(
            NET, MODEL, subjects, guidance[first : first + 1], pooled[first : first + 1]
        )
    groups = [RowGroup(tuple(acting), True, found)]
    if idle:
        groups.append(RowGroup(tuple(idle), False))
    count = len(subjects)
    regions = torch.randint(0, count + 1, (cond, size), generator=generator)
    allowed = torch.rand(cond, count, size, generator=generator) < 0.6
    call, concepts = scene.call_of(
        MODEL,
        subjects,
        text,
        grid,
        tuple(groups),
        regions=regions if mode == "masks" else None,
        router=scene.router(MODEL, subjects) if mode.startswith("router") else None,
        allowed=allowed if mode == "router within masks" else None,
    )
    call.enter(NET, context)
    out = NET(tokens, grid, t, concepts.behind(context), pooled, guidance, call)
    for row in range(rows):
        place = acting.index(row) if row in acting else None
        expected = NAIVE.forward(
            tokens[row],
            grid,
            float(t[row]),
            context[row],
            pooled[row],
            float(guidance[row]),
            scene.people(subjects) if place is not None else [],
            router=mode.startswith("router") and place is not None,
            regions=regions[place] if mode == "masks" and place is not None else None,
            allowed=allowed[place] if mode == "router within masks" and place is not None else None,
        )
        assume(expected.margin > 1e-5)
        error = (out[row] - expected.tokens).norm() / expected.tokens.norm()
        assert error < EXACT, (row, float(error))


@settings(max_examples=60, deadline=None)
@given(drawn())
def test_by_region(case: dict[str, object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux_call, "LEAST_SORTED", 1)
        run(case)


@settings(max_examples=60, deadline=None)
@given(drawn())
def test_masked(case: dict[str, object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux_call, "LEAST_SORTED", 10**9)
        run(case)
