"""A whole call, block after block: rows, windows, records, symmetry."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from calls import HALVING, ODD, SITES, Grids, World, maps_of
from torch import Tensor

from anystory_core.injection.call import LEAST_SORTED, Recording, by_region
from anystory_core.injection.keys import Candidates
from anystory_core.injection.prepare import SiteConditions
from anystory_core.injection.rows import Rows
from anystory_core.routing.grids import resize_soft
from anystory_core.routing.sources import MaskRoutes

ARRANGEMENTS = {
    "uncond first": ("uncond", "cond", "cond"),
    "cond first": ("cond", "uncond", "uncond"),
    "mixed": ("cond", "uncond", "cond"),
    "cond only": ("cond", "cond", "cond"),
    "uncond only": ("uncond", "uncond", "uncond"),
    "one plain": ("plain", "cond", "uncond"),
    "two apart": ("uncond", "cond", "plain"),
    "plain between": ("cond", "plain", "cond"),
}


def rows_of(roles: tuple[str, ...]) -> Rows:
    return Rows(
        tuple(i for i, r in enumerate(roles) if r == "cond"),
        tuple(i for i, r in enumerate(roles) if r == "uncond"),
    )


@pytest.mark.parametrize("grids", [HALVING, ODD], ids=["halving", "odd"])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_every_arrangement_of_rows(name: str, way: str, keep: bool, grids: Grids) -> None:
    world = World(grids=grids)
    roles = ARRANGEMENTS[name]
    run = world.run(keep_references_in_uncond=keep)
    got = world.forward(world.call(run, rows_of(roles)))
    for row, role in enumerate(roles):
        wanted = world.expected(role, row, keep=keep)
        for index in wanted:
            for have, want in zip(got[index], wanted[index], strict=True):
                # Soft maps are float32: a near tie could fall the other way, but not at this seed.
                assert torch.allclose(have[row], want, atol=1e-9), (row, role, index)


@pytest.mark.parametrize("subjects", [1, 2, 3, 4])
def test_numbers_of_subjects(subjects: int) -> None:
    world = World(subjects, rows=1, seed=subjects)
    got = world.forward(world.call(world.run(), Rows((0,))))
    wanted = world.expected("cond", 0)
    for index in wanted:
        for have, want in zip(got[index], wanted[index], strict=True):
            assert torch.allclose(have[0], want, atol=1e-9)


def test_an_inactive_subject_keeps_its_region_but_gives_nothing() -> None:
    world = World()
    active = (False, True)
    call = world.call(world.run(), Rows((0, 1), (2,)), factors=active)
    got = world.forward(call)
    wanted = world.expected("cond", 0, active=active)
    for index in wanted:
        for have, want in zip(got[index], wanted[index], strict=True):
            assert torch.allclose(have[0], want, atol=1e-9)
    full = world.call(world.run(), Rows((0, 1), (2,)))
    world.forward(full)
    for index, soft in maps_of(full).items():
        assert torch.equal(soft.maps, maps_of(call)[index].maps)


def test_exchanging_two_subjects_exchanges_their_regions_and_nothing_else() -> None:
    world = World()
    before = world.call(world.run(), Rows((0, 1, 2)))
    out = world.forward(before)
    swap = [1, 0, 2]
    world.routing = world.routing[:, swap]
    world.eta = tuple(world.eta[i] for i in swap)
    world.gamma = tuple(world.gamma[i] for i in swap)
    world.conditions = [
        SiteConditions(
            Candidates([c.clip[i] for i in swap]), Candidates([c.reference[i] for i in swap])
        )
        for c in world.conditions
    ]
    after = world.call(world.run(), Rows((0, 1, 2)))
    exchanged = world.forward(after)
    for index in out:
        assert torch.allclose(maps_of(before)[index].maps[:, swap], maps_of(after)[index].maps)
        for a, b in zip(out[index], exchanged[index], strict=True):
            assert torch.allclose(a, b, atol=1e-9)


def test_another_subject_never_reaches_a_foreign_region(way: str) -> None:
    """attn2 by the block's own route, attn1 by that of the block before."""
    world = World()
    call = world.call(world.run(), Rows((0, 1, 2)))
    out = world.forward(call)
    changed = World()
    for c, site in zip(changed.conditions, SITES, strict=True):
        for kv in (c.clip[1], c.reference[1]):
            assert kv is not None and kv.k.shape[-1] == site.channels
            kv.k.add_(1.0)
            kv.v.add_(1.0)
    other_call = changed.call(changed.run(), Rows((0, 1, 2)))
    other = changed.forward(other_call)
    seen = {"attn1": 0, "attn2": 0}
    for site in SITES:
        own = maps_of(call)[site.index]
        routes = {"attn2": own.maps.argmax(dim=1)}
        if site.index > 1:
            before = resize_soft(maps_of(call)[site.index - 1], own.grid)
            routes["attn1"] = before.maps.argmax(dim=1)
        for name, route in routes.items():
            place = ("attn1", "attn2").index(name)
            one, two = out[site.index][place], other[site.index][place]
            foreign = route != 1
            assert torch.equal(one[foreign], two[foreign])
            assert bool((one != two).any(dim=-1)[~foreign].all())
            seen[name] += int((~foreign).sum())
    assert all(seen.values())


def test_the_same_subject_twice_equals_once() -> None:
    world = World(subjects=1)
    masks = torch.zeros(4, 6)
    masks[:, :3] = 1
    once = world.forward(world.call(world.run(source=MaskRoutes((masks,))), Rows((0, 1, 2))))
    left, right = masks.clone(), masks.clone()
    left[2:], right[:2] = 0, 0
    twice = world.run(
        source=MaskRoutes((left, right)),
        conditions=tuple(
            SiteConditions(
                Candidates([c.clip[0], *c.clip]), Candidates([c.reference[0], *c.reference])
            )
            for c in world.conditions
        ),
        strengths=(world.eta[0], *world.eta),
        biases=(world.gamma[0], *world.gamma),
    )
    call = world.call(twice, Rows((0, 1, 2)), factors=(1.0, 1.0))
    for index, pair in world.forward(call).items():
        for a, b in zip(pair, once[index], strict=True):
            assert torch.allclose(a, b, atol=1e-9)


def test_the_first_block_has_no_references_and_a_missing_route_none() -> None:
    world = World()
    call = world.call(world.run(), Rows((0, 1, 2)))
    q, k, v, *_ = world.hidden[1]
    assert call.self_attention(1, q, k, v, world.grids[SITES[0].stride]) is None
    q, k, v, *_ = world.hidden[2]
    assert call.self_attention(2, q, k, v, world.grids[SITES[1].stride]) is None


@pytest.mark.usefixtures("way")
def test_self_attention_without_references_stays_the_hosts() -> None:
    """Bit for bit: no subject has any, or each is at strength 0 in this step."""
    world = World(2, rows=1, seed=3)
    none = [dataclasses.replace(c, reference=Candidates([None] * 3)) for c in world.conditions]
    for run, factors in (
        (world.run(conditions=tuple(none)), (1.0, 1.0)),
        (world.run(), (0.0, 0.0)),
    ):
        call = world.call(run, Rows((0,)), factors=factors)
        q, k, v, z, *_ = world.hidden[1]
        call.begin_cross_attention(1, z, world.grids[SITES[0].stride])
        q, k, v, *_ = world.hidden[2]
        assert call.self_attention(2, q, k, v, world.grids[SITES[1].stride]) is None


def test_which_rows_are_sorted_by_region() -> None:
    """Long ones on a processor, outside of training and of compiled models."""

    def rows(tokens: int, device: str = "cpu") -> Tensor:
        return torch.zeros(1, tokens, 2, device=device)

    assert by_region(rows(LEAST_SORTED)) and not by_region(rows(LEAST_SORTED - 1))
    assert not by_region(rows(LEAST_SORTED, "meta"))
    assert not by_region(rows(LEAST_SORTED).requires_grad_())

    def asked(q: Tensor) -> Tensor:
        return q + 1 if by_region(q) else q

    compiled = torch.compile(asked, backend="eager", fullgraph=True)
    assert asked(rows(LEAST_SORTED)).any() and not compiled(rows(LEAST_SORTED)).any()


def test_idle() -> None:
    world = World()
    run = world.run()
    assert run.is_idle((False, False)) and not run.is_idle((False, True))
    silent = world.run(strengths=(0.0, 0.0, 0.0), biases=(-math.inf,) * 3)
    assert silent.is_idle((True, True))
    off = (0.0,) * 3, (-math.inf,) * 3
    for number in range(2):  # a little of one subject's concept, or of its reference, is something
        concept, reference = list(off[0]), list(off[1])
        concept[number], reference[number] = 0.1, math.log(0.1)
        for strengths, biases in ((concept, off[1]), (off[0], reference)):
            faint = world.run(strengths=tuple(strengths), biases=tuple(biases))
            assert not faint.is_idle((1.0, 1.0)) and not faint.is_idle((0.1, 0.1))
            assert faint.is_idle((0.0, 1.0) if number == 0 else (1.0, 0.0))


def test_recorder_gets_the_asked_rows() -> None:
    world = World()
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    class Keep:
        def record(self, index: int, ids: Tensor, grid: tuple[int, int], soft: Tensor) -> None:
            assert math.prod(grid) == ids.shape[1]
            seen[index] = ids, soft

    whole = world.call(world.run(), Rows((1, 2), (0,)))
    world.forward(whole)
    world.forward(world.call(world.run(), Rows((1, 2), (0,)), recording=Recording(Keep(), (2,))))
    assert sorted(seen) == [s.index for s in SITES]
    for index, (ids, soft) in seen.items():
        assert ids.dtype == torch.uint8 and ids.shape[0] == 1
        assert torch.equal(soft[0], maps_of(whole)[index].maps[1])
        assert torch.equal(ids[0].long(), soft[0].argmax(dim=0))
