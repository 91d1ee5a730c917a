"""The folded router against DESIGN's box written out token by token."""

from __future__ import annotations

import naive
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.config import RouterConfig
from anystory_core.routing.router import Router, Routers

# Folding changes the order of float64 sums only.
TOLERANCE = 1e-9


def make(seed: int, width: int, routing: int, heads: int, refine: bool = True) -> Router:
    torch.manual_seed(seed)
    config = RouterConfig(key_dim=4 * heads, heads=heads, refine=refine)
    return Router(config, width=width, routing_dim=routing, dtype=torch.float64)


def maps(router: Router, r: Tensor, z: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, ...]:
    logits = router.prepare(r).logits(z, allowed)
    return logits.coarse.softmax(dim=1), logits.refined.softmax(dim=1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    candidates=st.integers(1, 5),
    tokens=st.integers(1, 21),
    heads=st.sampled_from((1, 2, 4)),
    rows=st.integers(1, 3),
    forbid=st.booleans(),
)
def test_equals_the_box(
    seed: int, candidates: int, tokens: int, heads: int, rows: int, forbid: bool
) -> None:
    router = make(seed, 12, 10, heads)
    # Large features make coarse regions differ, and leave some candidates without any token.
    r = 3 * torch.randn(rows, candidates, 10, dtype=torch.float64)
    z = 3 * torch.randn(rows, tokens, 12, dtype=torch.float64)
    allowed = None
    if forbid:
        allowed = torch.rand(rows, candidates, tokens) < 0.6
        allowed[:, -1] = True
    coarse, refined = maps(router, r, z, allowed)
    for row in range(rows):
        wanted = naive.router(
            dict(router.state_dict()),
            r[row],
            z[row],
            heads,
            None if allowed is None else allowed[row],
        )
        # Maps leave the router in float32: that is the rounding of one number below 1.
        assert torch.allclose(coarse[row].double(), wanted[0], atol=1e-6, rtol=0)
        assert torch.allclose(refined[row].double(), wanted[1], atol=1e-6, rtol=0)


def test_an_empty_region_attends_to_every_token() -> None:
    router = make(3, 12, 10, 2)
    z = torch.randn(1, 9, 12, dtype=torch.float64)
    r = torch.randn(1, 3, 10, dtype=torch.float64)
    with torch.no_grad():
        router.coarse_r.weight.zero_()  # all scores equal: every token goes to candidate 0
    coarse, refined = maps(router, r, z)
    assert torch.allclose(coarse, torch.full_like(coarse, 1 / 3))
    wanted = naive.router(dict(router.state_dict()), r[0], z[0], 2)[1]
    assert torch.allclose(refined[0].double(), wanted, atol=1e-6)


def test_without_refinement_the_map_is_the_coarse_one() -> None:
    router = make(4, 12, 10, 2, refine=False)
    r = torch.randn(1, 3, 10, dtype=torch.float64)
    z = torch.randn(2, 7, 12, dtype=torch.float64)
    logits = router.prepare(r).logits(z)
    assert logits.refined is logits.coarse
    assert set(router.state_dict()) == {"coarse_r.weight", "coarse_z.weight"}


def test_one_set_of_features_serves_all_rows() -> None:
    router = make(5, 12, 10, 2)
    r = torch.randn(1, 3, 10, dtype=torch.float64)
    z = torch.randn(4, 7, 12, dtype=torch.float64)
    together = router.prepare(r).logits(z).refined
    apart = torch.cat([router.prepare(r).logits(row[None]).refined for row in z])
    assert torch.allclose(together, apart, atol=TOLERANCE)


def test_half_precision_keeps_maps_in_float32() -> None:
    router = make(6, 12, 10, 2).to(torch.bfloat16)
    r = torch.randn(1, 3, 10).bfloat16()
    logits = router.prepare(r).logits(torch.randn(2, 7, 12).bfloat16())
    assert logits.refined.dtype == torch.float32


def test_all_routers_are_made_as_asked() -> None:
    """In the number type, on the device and of the layers that were named."""
    sites = build_sites(AnyStoryConfig.mini().unet)
    made = Routers(
        RouterConfig(key_dim=8, heads=2), sites, routing_dim=10,
        operations=torch.nn, dtype=torch.bfloat16, device="meta",
    )  # fmt: skip
    assert [index for index, _ in made.items()] == [site.index for site in sites]
    parameters = list(made.parameters())
    assert {p.dtype for p in parameters} == {torch.bfloat16} and all(p.is_meta for p in parameters)
