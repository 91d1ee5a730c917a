"""Routing by words: the documented rule, transcribed in float64."""

from __future__ import annotations

import math

import pytest
import torch
from calls import Maps
from torch import Tensor

from anystory_core.bases.base import Site
from anystory_core.bases.sdxl.sites import build_sites
from anystory_core.errors import RoutingError
from anystory_core.injection.call import Call, Recording, Shown
from anystory_core.injection.keys import Candidates, KeyValue
from anystory_core.injection.prepare import PreparedSubjects, SiteConditions
from anystory_core.injection.rows import Rows
from anystory_core.routing.grids import Crop, Grid
from anystory_core.routing.sources import MaskRoutes
from anystory_core.routing.words import TextRoutes, Texts
from anystory_core.training.hosts.unet import dense_attention

from .public_weights import small_config

CONFIG = small_config()
SITES = build_sites(CONFIG.unet)
WIDTH = CONFIG.unet.context_dim
# the code computes scores in float32
TOLERANCE = 2e-5


class Words:
    """Random text states of labels of ``sizes`` tokens, and random key maps."""

    def __init__(self, seed: int, sizes: tuple[int, ...]) -> None:
        make = torch.Generator().manual_seed(seed)
        self.states = [torch.randn(n, WIDTH, generator=make) for n in sizes]
        self.weights = {
            site.index: torch.randn(site.channels, WIDTH, generator=make) / WIDTH**0.5
            for site in SITES
        }
        self.projected: list[int] = []

    def keys(self, site: Site, states: Tensor) -> Tensor:
        self.projected.append(site.index)
        return states @ self.weights[site.index].T

    def texts(self) -> Texts:
        return Texts(tuple(self.states), self.keys)


def naive_scores(words: Words, site: Site, q: Tensor) -> Tensor:
    """(B,N,Q), loop by loop: the largest logit over a label's tokens, each less its mean over the
    picture; of the heads' exponentials the mean's logarithm."""
    q, weight = q.double(), words.weights[site.index].double()
    size = site.channels // site.heads
    places = range(q.shape[1])
    out = torch.zeros(q.shape[0], len(words.states), q.shape[1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for i, states in enumerate(words.states):
            for h in range(site.heads):
                part = slice(h * size, (h + 1) * size)
                logits = []
                for token in states:
                    key = (weight @ token.double())[part]
                    row = [float(q[b, u, part] @ key) / math.sqrt(size) for u in places]
                    logits.append([value - sum(row) / len(row) for value in row])
                for u in places:
                    out[b, i, u] += math.exp(max(row[u] for row in logits)) / site.heads
    return out.log()


def naive_maps(mean: Tensor) -> Tensor:
    """m (B,N,Q) -> p (B,N+1,Q): deviations of each subject's map against the background's level."""
    out = torch.zeros(mean.shape[0], mean.shape[1] + 1, mean.shape[2], dtype=torch.float64)
    for b, row in enumerate(mean):
        z = []
        for m in row:
            middle = float(m.sum()) / len(m)
            deviation = math.sqrt(sum((float(x) - middle) ** 2 for x in m) / len(m))
            z.append([(float(x) - middle) / deviation for x in m])
        for u in range(mean.shape[2]):
            powers = [math.exp(values[u]) for values in z] + [math.exp(0.5)]
            for i, power in enumerate(powers):
                out[b, i, u] = power / sum(powers)
    return out


def resized(maps: Tensor, old: Grid, new: Grid) -> Tensor:
    """Grids here differ by a factor of 2: area average down, bilinear (half-pixel centres) up."""
    if old == new:
        return maps
    image = maps.reshape(*maps.shape[:2], *old)
    out = torch.zeros(*maps.shape[:2], *new, dtype=torch.float64)
    for y in range(new[0]):
        for x in range(new[1]):
            if new[0] < old[0]:
                out[..., y, x] = image[..., 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((-1, -2))
                continue
            total = torch.zeros(maps.shape[:2], dtype=torch.float64)
            fy, fx = max((y + 0.5) / 2 - 0.5, 0), max((x + 0.5) / 2 - 0.5, 0)
            for dy in (0, 1):
                for dx in (0, 1):
                    row, column = min(int(fy) + dy, old[0] - 1), min(int(fx) + dx, old[1] - 1)
                    wy = fy - int(fy) if dy else 1 - (fy - int(fy))
                    wx = fx - int(fx) if dx else 1 - (fx - int(fx))
                    total += wy * wx * image[..., row, column]
            out[..., y, x] = total
    return out.flatten(2)


NOTHING = (SiteConditions(Candidates([None, None]), Candidates([None, None])),) * 2


def grid_of(site: Site) -> Grid:
    return 16 // site.stride, 8 // site.stride


@pytest.mark.parametrize("seed", range(3))
def test_rule_over_blocks_and_steps(seed: int) -> None:
    """Two steps of all 16 blocks on their own grids; the second forgets the first."""
    words = Words(seed, (1 + seed, 3))
    routes = TextRoutes(words.texts(), SITES)
    memory = routes.memory("")
    make = torch.Generator().manual_seed(100 + seed)
    finest = grid_of(SITES[0])
    tokens = [grid_of(site)[0] * grid_of(site)[1] for site in SITES]
    assert max(tokens) == finest[0] * finest[1] > min(tokens)
    mean: Tensor | None = None
    total = 0.0
    for _ in range(2):
        for site in SITES:
            grid = grid_of(site)
            q = 2 * torch.randn(2, grid[0] * grid[1], site.channels, generator=make)
            soft = routes.maps_of_query(site, q, grid, (), memory)
            fresh = resized(naive_scores(words, site, q), grid, finest)
            weight = grid[0] * grid[1] / max(tokens)
            total = min(total + weight, sum(tokens) / max(tokens))
            mean = fresh if mean is None else mean + (fresh - mean) * weight / total
            expected = resized(naive_maps(mean), finest, grid)
            assert soft.grid == grid
            assert float((soft.maps - expected).abs().max()) < TOLERANCE
            assert torch.allclose(soft.maps.sum(1), torch.ones(2, grid[0] * grid[1]), atol=1e-5)
    assert words.projected == [site.index for site in SITES]  # once per run, not per step


def test_one_block_alone() -> None:
    """Its latest score decides at every block; before it has run, the background has all."""
    words = Words(6, (2, 3))
    chosen = SITES[4]
    routes = TextRoutes(words.texts(), SITES, block=chosen.index)
    memory = routes.memory("")
    make = torch.Generator().manual_seed(2)
    latest: tuple[Tensor, Grid] | None = None
    for _ in range(2):
        for site in SITES:
            grid = grid_of(site)
            q = 2 * torch.randn(2, grid[0] * grid[1], site.channels, generator=make)
            soft = routes.maps_of_query(site, q, grid, (), memory)
            if site is chosen:
                latest = naive_scores(words, site, q), grid
            if latest is None:
                assert bool((soft.maps[:, :-1] == 0).all() and (soft.maps[:, -1] == 1).all())
                continue
            maps = naive_maps(latest[0])
            if latest[1][0] > grid[0]:
                image = maps.reshape(2, 3, *latest[1])
                wanted = torch.nn.functional.adaptive_avg_pool2d(image, grid).flatten(2)
            else:
                wanted = resized(maps, latest[1], grid)
            assert float((soft.maps - wanted).abs().max()) < TOLERANCE
    assert words.projected == [chosen.index]


def test_scores_alone() -> None:
    words = Words(4, (1, 4))
    routes = TextRoutes(words.texts(), SITES)
    for site in (SITES[0], SITES[3]):
        q = torch.randn(2, 32, site.channels, generator=torch.Generator().manual_seed(4))
        assert (
            float((routes.scores(site, q) - naive_scores(words, site, q)).abs().max()) < TOLERANCE
        )


def test_a_token_that_draws_attention_everywhere_changes_nothing() -> None:
    """One word's logits are raised by 30 all over the picture, as an attention sink's are."""
    site = SITES[0]
    height, width = grid_of(site)
    make = torch.Generator().manual_seed(11)
    q = torch.randn(1, height * width, site.channels, generator=make)
    q[..., :: site.channels // site.heads] = 1  # one coordinate of every head is the same anywhere
    maps = []
    for sink in (0.0, 30.0):
        words = Words(12, (2, 2))
        own = words.states[0][0]
        size = site.channels // site.heads

        def keys(_: Site, states: Tensor, words: Words = words, sink: float = sink) -> Tensor:
            out = states @ words.weights[site.index].T
            raised = (states == own).all(dim=-1)  # noqa: B023
            out[..., ::size] += sink * size**0.5 * raised[..., None]  # noqa: B023
            return out

        routes = TextRoutes(Texts(tuple(words.states), keys), SITES)
        maps.append(routes.maps_of_query(site, q, (height, width), (), routes.memory(None)).maps)
    assert float((maps[0] - maps[1]).abs().max()) < 1e-4
    assert all(int((maps[0].argmax(1) == i).sum()) > 0 for i in range(3))


def test_a_subject_of_four_fifths_of_the_picture_is_found() -> None:
    """The background's level leaves room for it; and for one of a tenth."""
    site, count = SITES[0], 100
    word = torch.ones(1, WIDTH)
    for share in (10, 79):
        inside = torch.arange(count) < share
        q = torch.where(inside[:, None], 1.0, -1.0).expand(count, site.channels)[None]
        routes = TextRoutes(
            Texts((word,), lambda _, states: states[..., :1].expand(1, 1, site.channels)), SITES
        )
        maps = routes.maps_of_query(site, q, (10, 10), (), routes.memory(None)).maps
        assert torch.equal(maps.argmax(1)[0] == 0, inside)


@pytest.mark.parametrize("kinds", [("a", "b"), ("a", None), (None, None)])
def test_kinds_of_calls_do_not_mix(kinds: tuple[str | None, str | None]) -> None:
    """Prompts that come in calls of their own keep their own means; a call of no kind neither
    takes nor leaves anything, but its blocks go on from one another."""
    words = Words(5, (2,))
    grid = grid_of(SITES[0])
    make = torch.Generator().manual_seed(6)
    site = SITES[0]
    q = [torch.randn(1, grid[0] * grid[1], site.channels, generator=make) for _ in range(6)]

    def routed(order: list[int]) -> dict[int, list[Tensor]]:
        """Maps of both blocks of the calls in ``order``, each over two queries of its own."""
        routes = TextRoutes(words.texts(), SITES)
        out: dict[int, list[Tensor]] = {}
        for number in order:
            run = PreparedSubjects(NOTHING, routes, (1.0, 1.0), (-math.inf, -math.inf))
            kind = kinds[number % 2]
            maps = Maps()
            call = Call(
                run, Rows((0,)), (True,), SITES, dense_attention, Shown(kind=kind),
                Recording(maps, (0,)),
            )  # fmt: skip
            for index in (1, 2):
                call.begin_cross_attention(index, q[0], grid)
                call.cross_attention(index, q[(number + index) % 6], torch.zeros_like(q[0]))
            call.record()
            out[number] = [maps[index].maps for index in (1, 2)]
        return out

    mixed = routed([0, 1, 2, 3])
    for number, kind in enumerate(kinds * 2):
        before = [number - 2] if kind is not None and number > 1 else []
        alone = routed([*before, number])[number]
        for got, wanted in zip(mixed[number], alone, strict=True):
            assert torch.equal(got, wanted)
    first, second = (routed([0])[0], routed([0, 2])[2])
    assert not torch.equal(first[1], second[1])


def test_the_finest_grid_has_the_most_places() -> None:
    """Whichever way a grid lies: the mean of a block on (2, 9) and one on (5, 4) is on the latter,
    and stays there."""
    words = Words(9, (2, 3))
    routes = TextRoutes(words.texts(), SITES)
    make = torch.Generator().manual_seed(3)
    for order in (((2, 9), (5, 4)), ((5, 4), (2, 9)), ((9, 2), (4, 5)), ((4, 5), (9, 2))):
        memory = routes.memory(order)
        for grid in order:
            q = torch.randn(1, grid[0] * grid[1], SITES[0].channels, generator=make)
            routes.maps_of_query(SITES[0], q, grid, (), memory)
        assert memory.mean is not None and memory.mean.grid in ((5, 4), (4, 5))


def test_a_call_that_runs_again_begins_where_it_had_begun() -> None:
    words = Words(10, (2, 3))
    routes = TextRoutes(words.texts(), SITES)
    make = torch.Generator().manual_seed(4)
    queries = [torch.randn(1, 6, SITES[0].channels, generator=make) for _ in range(3)]

    def call(q: Tensor, *, again: bool = False) -> Tensor:
        memory = routes.memory("kind", again=again)
        return routes.maps_of_query(SITES[0], q, (2, 3), (), memory).maps

    call(queries[0])
    call(queries[1])
    wanted = call(queries[2])
    routes.of_run(None)  # another run's memories are its own
    again = call(queries[2], again=True)
    assert torch.equal(again, wanted)
    other = TextRoutes(words.texts(), SITES)
    other.maps_of_query(SITES[0], queries[0], (2, 3), (), other.memory("kind"))
    swapped = other.maps_of_query(
        SITES[0], queries[2], (2, 3), (), other.memory("kind", again=True)
    )
    alone = TextRoutes(words.texts(), SITES)
    first = alone.maps_of_query(SITES[0], queries[2], (2, 3), (), alone.memory("kind"))
    assert torch.equal(swapped.maps, first.maps)


@pytest.mark.parametrize("block", [0, SITES[-1].index])
def test_rows_that_see_parts_have_the_masks_of_their_parts(block: int) -> None:
    """Before a chosen block has run, too, when all is the background's."""
    masks = torch.zeros(2, 4, 4)
    masks[0, :, :2], masks[1, :, 2:] = 1, 1
    words = Words(11, (2, 3))
    routes = TextRoutes(words.texts(), SITES, masks=MaskRoutes(tuple(masks)), block=block)
    crops = (Crop(0, 0, 4, 2, 4, 4), Crop(0, 2, 4, 2, 4, 4))
    q = torch.randn(2, 8, SITES[0].channels, generator=torch.Generator().manual_seed(5))
    soft = routes.maps_of_query(SITES[0], q, (4, 2), crops, routes.memory(None))
    assert soft.grid == (4, 2) and soft.maps.shape == (2, 3, 8)
    for maps in (soft.maps, routes.resize(soft, (4, 2), crops).maps):
        assert not maps[0, 1].any() and not maps[1, 0].any()
        assert bool((maps[:, 2] > 0).all())
        assert bool(maps[0, 0].any()) == bool(maps[1, 1].any()) == (block == 0)


def test_masks_confine_the_words() -> None:
    """A subject never leaves its mask, at any grid; inside, the words still decide."""
    words = Words(7, (2, 3))
    masks = torch.zeros(2, 16, 8)
    masks[0, :, :4] = 1
    masks[1, :6] = 1
    routes = TextRoutes(words.texts(), SITES, masks=MaskRoutes(tuple(masks)))
    memory = routes.memory("")
    make = torch.Generator().manual_seed(8)
    free = 0
    for site in SITES:
        grid = grid_of(site)
        q = 3 * torch.randn(1, grid[0] * grid[1], site.channels, generator=make)
        ids = routes.maps_of_query(site, q, grid, (), memory).maps.argmax(1)[0]
        inside = torch.nn.functional.adaptive_avg_pool2d(masks, grid).flatten(1) >= 0.5
        for i in range(2):
            assert not bool(((ids == i) & ~inside[i]).any())
            free += int(((ids != i) & inside[i]).sum())
        for other in ((8, 4), (16, 8), (5, 7)):  # as the next block's self-attention takes it
            soft = routes.maps_of_query(site, q, grid, (), memory)
            carried = routes.resize(soft, other, ()).maps.argmax(1)[0]
            inside = torch.nn.functional.adaptive_avg_pool2d(masks, other).flatten(1) >= 0.5
            for i in range(2):
                assert not bool(((carried == i) & ~inside[i]).any())
    assert free > 0


def test_call_routes_by_the_query() -> None:
    """A subject whose word's key points along the queries of the left half is injected there and
    nowhere else, from the first block on; the route reaches the next block's self-attention."""
    site = SITES[0]
    height, width = grid_of(site)
    left = torch.zeros(height, width, dtype=torch.bool)
    left[:, : width // 2] = True
    direction = torch.randn(site.channels, generator=torch.Generator().manual_seed(9))
    q = torch.where(left.flatten()[:, None], direction, -direction)[None]
    word = torch.ones(1, WIDTH)

    def keys(_: Site, states: Tensor) -> Tensor:
        return states[..., :1] * direction

    routes = TextRoutes(Texts((word,), keys), SITES)
    make = torch.Generator().manual_seed(10)

    def kv() -> KeyValue:
        return KeyValue(*(torch.randn(1, 3, site.channels, generator=make) for _ in range(2)))

    conditions = (
        SiteConditions(Candidates([kv(), None]), Candidates([None, None])),
        SiteConditions(Candidates([None, None]), Candidates([kv(), None])),
    )
    run = PreparedSubjects(conditions, routes, (1.0, 1.0), (0.0, -math.inf))
    call = Call(run, Rows((0,)), (True,), SITES, dense_attention)
    call.begin_cross_attention(1, torch.zeros_like(q), (height, width))
    text = torch.randn(q.shape, generator=make)
    changed = (call.cross_attention(1, q, text) - text).abs().sum(-1)[0] > 0
    assert torch.equal(changed, left.flatten())
    x = [torch.randn(q.shape, generator=make) for _ in range(3)]
    out = call.self_attention(2, *x, (height, width))
    assert out is not None
    plain = dense_attention(*x, SITES[1].heads)
    assert torch.equal((out - plain).abs().amax(-1)[0] > 1e-4, left.flatten())


def test_wrong_values_are_named() -> None:
    with pytest.raises(RoutingError, match="subject 2 has states of shape"):
        Texts((torch.zeros(1, 4), torch.zeros(0, 4)), lambda s, x: x)
