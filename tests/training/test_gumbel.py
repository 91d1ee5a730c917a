"""While training, Eq. 5 weighs by the sampled route and Eq. 6 follows the noise-free one."""

from __future__ import annotations

import tiny
import torch
from torch import Tensor

from anystory_core.bases.base import Site
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.injection.keys import Candidates, KeyValue
from anystory_core.injection.prepare import PreparedSubjects, SiteConditions
from anystory_core.injection.rows import Rows
from anystory_core.routing.grids import Crops, Grid, SoftMaps
from anystory_core.routing.router import RoutingLogits
from anystory_core.training.call import TrainingCall, straight_through
from anystory_core.training.dataset import sample_seed
from anystory_core.training.hosts.unet import dense_attention
from anystory_core.training.noise import gumbel_seeds

ROWS, GRID, SEEDS = 2, (4, 4), (5, 6)
TOKENS = GRID[0] * GRID[1]


class GivenLogits:
    """A router's answer that the test chose."""

    candidates = 3

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def maps(self, site: Site, z: Tensor, grid: Grid, crops: Crops) -> SoftMaps:
        return SoftMaps(self.logits.softmax(dim=1), grid, RoutingLogits(self.logits, self.logits))

    def resize(self, soft: SoftMaps, grid: Grid, crops: Crops) -> SoftMaps:
        raise AssertionError("all blocks of this test have one grid")


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head."""
    parts = [x.chunk(heads, dim=-1) for x in (q, k, v)]
    return torch.cat(
        [
            ((a @ b.transpose(-1, -2)) / a.shape[-1] ** 0.5).softmax(dim=-1) @ c
            for a, b, c in zip(*parts, strict=True)
        ],
        dim=-1,
    )


def test_equation_5_is_sampled_and_equation_6_is_not() -> None:
    torch.manual_seed(0)
    sites = build_sites(tiny.config().unet)[:2]
    width, heads = sites[0].channels, sites[0].heads
    logits = 0.3 * torch.randn(ROWS, 3, TOKENS, dtype=torch.float64)
    keys = [KeyValue(*torch.randn(2, ROWS, 3, width, dtype=torch.float64)) for _ in range(5)]
    clip, reference = keys[:3], [*keys[3:], None]
    run = PreparedSubjects(
        tuple(
            SiteConditions(Candidates([*clip]), Candidates(given))
            for given in ([None] * 3, [*reference])
        ),
        GivenLogits(logits),
        (1.0, 0.5, 1.0),
        (0.0, 0.0, -torch.inf),
    )
    call = TrainingCall(run, Rows((0, 1)), (True, True), sites, dense_attention, gumbel=SEEDS)
    z = torch.zeros(ROWS, TOKENS, width, dtype=torch.float64)
    call.begin_cross_attention(1, z, GRID)
    q, k, v = torch.randn(3, ROWS, TOKENS, width, dtype=torch.float64)

    drawn = straight_through(logits, [seed * len(sites) + 1 for seed in SEEDS])
    route = logits.argmax(dim=1)
    assert not torch.equal(drawn.argmax(dim=1), route)  # or this test could not tell them apart
    wanted = torch.zeros_like(q)
    for i, eta in enumerate((1.0, 0.5, 1.0)):
        wanted += eta * drawn[:, i, :, None] * attend(q, clip[i].k, clip[i].v, heads)
    assert torch.allclose(call.cross_attention(1, q, torch.zeros_like(q)), wanted, atol=1e-10)

    got = call.self_attention(2, q, k, v, GRID)
    assert got is not None
    for row in range(ROWS):
        for u in range(TOKENS):
            own = reference[int(route[row, u])]
            ks, vs = k[row], v[row]
            if own is not None:
                ks, vs = torch.cat((ks, own.k[row])), torch.cat((vs, own.v[row]))
            one = attend(q[None, row, u : u + 1], ks[None], vs[None], heads)
            assert torch.allclose(got[row, u], one[0, 0], atol=1e-10)


def test_noise_depends_on_the_runs_seed_and_the_samples_number() -> None:
    seeds = [*gumbel_seeds(0, range(100)), *gumbel_seeds(1, range(100))]
    assert len(set(seeds)) == 200
    for seed in gumbel_seeds(2**40, [2**40]):  # times the blocks of SDXL it is still a seed
        torch.Generator().manual_seed(seed * 70 + 70)
    assert gumbel_seeds(3, [4]) == (sample_seed(3, 4),)


def test_straight_through_is_one_hot_with_the_soft_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weights = straight_through(logits, [7, 8])
    assert torch.equal(
        weights.detach().round(),
        torch.nn.functional.one_hot(weights.detach().argmax(dim=1), 3).movedim(-1, 1).double(),
    )
    assert torch.equal(weights, straight_through(logits, [7, 8]))
    assert not torch.equal(weights, straight_through(logits, [9, 8]))
    probe = torch.randn_like(logits)
    (got,) = torch.autograd.grad((weights * probe).sum(), logits)

    def soft(x: Tensor) -> Tensor:
        noise = []
        for seed in (7, 8):
            generator = torch.Generator().manual_seed(seed)
            noise.append(torch.rand(3, 5, generator=generator, dtype=torch.float64))
        gumbel = -torch.log(-torch.log(torch.stack(noise)))
        return ((x + gumbel).softmax(dim=1) * probe).sum()

    step = 1e-6
    for where in ((0, 0, 0), (1, 2, 4), (0, 1, 3)):
        shift = torch.zeros_like(logits)
        shift[where] = step
        difference = (soft(logits + shift) - soft(logits - shift)) / (2 * step)
        assert abs(float(difference) - float(got[where])) < 1e-6
