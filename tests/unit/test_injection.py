"""Eq. 5-8: every way of computing them against the equations in float64."""

from __future__ import annotations

import math
from functools import partial

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anystory_core.injection import equations as injection
from anystory_core.injection.keys import Candidates, KeyValue, Regions, bias_table, strength_table

HEADS, WIDTH = 2, 8
TOLERANCE = 1e-10  # float64 sums in another order


ATTEND = partial(naive.dense_attention, heads=HEADS)


class Case:
    """Random tensors of one layer: B rows that route differently, N subjects, odd sizes."""

    def __init__(self, seed: int, rows: int, tokens: int, subjects: int, per_row: bool) -> None:
        torch.manual_seed(seed)
        candidates = subjects + 1
        self.q, self.k, self.v, self.text = (self.normal(rows, tokens) for _ in range(4))
        # Few distinct ids in a row of many candidates: some regions are empty.
        self.route = torch.randint(0, candidates, (rows, tokens))
        if seed % 3 == 0:
            self.route[0] = int(torch.randint(0, candidates, ()))
        leading = rows if per_row else 1
        self.conditions: list[KeyValue | None] = []
        self.references: list[KeyValue | None] = []
        for i in range(candidates):
            absent = seed % 5 == 0 and i == 0
            length = 3 + i
            self.conditions.append(
                None
                if absent
                else KeyValue(self.normal(leading, length), self.normal(leading, length))
            )
            reference = KeyValue(self.normal(leading, 2 * length), self.normal(leading, 2 * length))
            self.references.append(None if i == subjects or absent else reference)
        self.eta = [0.0 if seed % 7 == 0 and i == 1 else 0.5 + 0.25 * i for i in range(candidates)]
        self.gamma = [math.log(0.25 + i) for i in range(candidates)]
        if seed % 2:
            self.gamma[0] = 0.0

    @staticmethod
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, WIDTH, dtype=torch.float64)

    def of_row(self, kvs: list[KeyValue | None], row: int) -> list[tuple[Tensor, Tensor] | None]:
        out: list[tuple[Tensor, Tensor] | None] = []
        for kv in kvs:
            one = None if kv is None else kv.row(row)
            out.append(None if one is None else (one.k[0], one.v[0]))
        return out

    def clip_masked(self, eta: list[float]) -> Tensor:
        conditions = Candidates(list(self.conditions))
        return injection.clip_masked(self.q, conditions, eta, self.route, ATTEND)

    def reference_masked(self) -> Tensor:
        references = Candidates(list(self.references))
        return injection.reference_masked(
            self.q, self.own, references, self.gamma, self.route, ATTEND
        )

    @property
    def own(self) -> KeyValue:
        return KeyValue(self.k, self.v)

    @property
    def regions(self) -> Regions:
        return Regions.of(self.route, len(self.conditions))


CASES = st.builds(
    Case,
    seed=st.integers(0, 999),
    rows=st.integers(1, 3),
    tokens=st.integers(1, 19),
    subjects=st.integers(0, 4),
    per_row=st.booleans(),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(CASES)
def test_equation_5(case: Case) -> None:
    args = (case.q, case.conditions, case.eta)
    one_hot = torch.nn.functional.one_hot(case.route, len(case.conditions)).movedim(-1, 1)
    ways = {
        "by region": injection.clip_by_region(*args, case.regions, ATTEND),
        "masked": case.clip_masked(case.eta),
        "dense": injection.clip_dense(*args, one_hot.double(), ATTEND),
    }
    for row in range(len(case.q)):
        wanted = naive.equation_5(
            case.q[row],
            case.text[row],
            case.route[row],
            case.of_row(case.conditions, row),
            case.eta,
            HEADS,
        )
        for name, way in ways.items():
            assert torch.allclose(case.text[row] + way[row], wanted, atol=TOLERANCE), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(CASES)
def test_equations_6_to_8(case: Case) -> None:
    args = (case.q, case.own, case.references, case.gamma)
    ways = {
        "by region": injection.reference_by_region(*args, case.regions, ATTEND),
        "masked": case.reference_masked(),
    }
    for row in range(len(case.q)):
        wanted = naive.equation_6(
            case.q[row],
            case.k[row],
            case.v[row],
            case.route[row],
            case.of_row(case.references, row),
            case.gamma,
            HEADS,
        )
        for name, way in ways.items():
            assert torch.allclose(way[row], wanted, atol=TOLERANCE), name


# Tokens of 832x1216, of 1016x1016 (its latent of 127x127 is halved by rounding up), of an odd
# latent, and one.
@pytest.mark.parametrize("grid", [(52, 76), (64, 64), (32, 61), (1, 1)])
def test_odd_and_large_grids(grid: tuple[int, int]) -> None:
    """Both ways over all tokens, each against the equation at sampled ones."""
    case = Case(11, 1, grid[0] * grid[1], 3, False)
    sampled = torch.linspace(0, grid[0] * grid[1] - 1, 7).long().unique()
    q, k, v, text, route = (x[0] for x in (case.q, case.k, case.v, case.text, case.route))
    clip = (case.q, case.conditions, case.eta)
    reference = (case.q, case.own, case.references, case.gamma)
    second = {
        "by region": injection.clip_by_region(*clip, case.regions, ATTEND)[0],
        "masked": case.clip_masked(case.eta)[0],
    }
    wanted = naive.equation_5(
        q[sampled], text[sampled], route[sampled], case.of_row(case.conditions, 0), case.eta, HEADS
    )
    for name, way in second.items():
        assert torch.allclose(text[sampled] + way[sampled], wanted, atol=TOLERANCE), name
    assert torch.allclose(*second.values(), atol=TOLERANCE)
    routed = {
        "by region": injection.reference_by_region(*reference, case.regions, ATTEND)[0],
        "masked": case.reference_masked()[0],
    }
    wanted = naive.equation_6(
        q[sampled], k, v, route[sampled], case.of_row(case.references, 0), case.gamma, HEADS
    )
    for name, way in routed.items():
        assert torch.allclose(way[sampled], wanted, atol=TOLERANCE), name
    assert torch.allclose(*routed.values(), atol=TOLERANCE)


def test_strength_zero_and_absent_give_nothing() -> None:
    case = Case(1, 2, 6, 2, False)
    zero = injection.clip_by_region(case.q, case.conditions, [0.0] * 3, case.regions, ATTEND)
    assert torch.count_nonzero(zero) == 0
    assert torch.count_nonzero(case.clip_masked([0.0] * 3)) == 0
    case.conditions = [None] * 3
    assert torch.count_nonzero(case.clip_masked(case.eta)) == 0


@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0, 2.0])
def test_one_candidate_everywhere_is_equation_5(strength: float) -> None:
    """As unconditional rows have it: one condition at every token, one set of keys for all rows or
    one for each."""
    for per_row in (False, True):
        case = Case(3, 2, 6, 2, per_row)
        condition = case.conditions[2]
        assert condition is not None
        found = injection.clip_everywhere(case.q, condition, strength, ATTEND)
        for row in range(2):
            wanted = naive.equation_5(
                case.q[row],
                case.text[row],
                torch.zeros(6, dtype=torch.long),
                case.of_row([condition], row),
                [strength],
                HEADS,
            )
            assert torch.allclose(case.text[row] + found[row], wanted, atol=TOLERANCE)
        nothing = injection.clip_everywhere(case.q, None, strength, ATTEND)
        assert nothing.shape == case.q.shape and not nothing.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_text_gate_is_one_on_average(dtype: torch.dtype) -> None:
    """In float32 at least, whatever the attention's number type and the file's."""
    make = torch.Generator().manual_seed(0)
    text = torch.randn(2, 5, 8, generator=make).to(dtype)
    weight = torch.randn(1, 8, generator=make)
    gate = injection.text_gate(text, weight)
    wanted = torch.tensor(
        [
            [
                1 / (1 + math.exp(-float(token.double() @ weight[0].to(dtype).double())))
                for token in row
            ]
            for row in text
        ],
        dtype=torch.float64,
    )
    wanted /= wanted.mean(dim=1, keepdim=True)
    assert gate.dtype == torch.promote_types(dtype, torch.float32) and gate.shape == (2, 5, 1)
    # bfloat16 rounds the logit, of up to 8, to a 256th of it
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(gate[..., 0].double(), wanted, atol=tolerance)


def test_joined_keys_hold_nothing_twice() -> None:
    case = Case(1, 2, 6, 2, True)
    candidates = Candidates([case.conditions[0], None, case.conditions[2]])
    before = [None if p is None else (p.k.clone(), p.v.clone()) for p in candidates]
    joined = candidates.joined(2, case.q)
    assert joined is not None and candidates.joined(2, case.q) is joined
    assert candidates.lengths == (3, 0, 5) and candidates.rows == 2
    for part, old in zip(candidates, before, strict=True):
        assert (part is None) == (old is None)
        if part is not None and old is not None:
            assert torch.equal(part.k, old[0]) and torch.equal(part.v, old[1])
            assert part.k.untyped_storage().data_ptr() == joined.k.untyped_storage().data_ptr()
            assert part.v.untyped_storage().data_ptr() == joined.v.untyped_storage().data_ptr()


def test_sorting_is_undone_exactly() -> None:
    torch.manual_seed(0)
    route = torch.randint(0, 5, (3, 17))
    regions = Regions.of(route, 5)
    x = torch.randn(3, 17, 4)
    for row, sizes in enumerate(regions.sizes):
        pieces = regions.sort(x, row, sizes)
        assert sum(sizes) == 17
        assert [p.shape[1] for p in pieces] == [int((route[row] == i).sum()) for i in range(5)]
        assert torch.equal(regions.unsort(pieces, row), x[row])


def test_a_bias_of_zero_takes_no_mask() -> None:
    """Kernels are quicker without one, and a reference at its full strength needs none."""
    case = Case(1, 1, 6, 2, False)
    seen: list[bool] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        seen.append(mask is not None)
        return ATTEND(q, k, v, mask=mask)

    regions = Regions.of(torch.tensor([[0, 0, 1, 1, 2, 2]]), 3)
    references = [KeyValue(case.normal(1, 4), case.normal(1, 4)) for _ in range(2)]
    case.references = [*references, None]
    for biases, masked in (([0.0, 0.0, 0.0], [False] * 3), ([0.0, 0.7, 0.7], [False, True, False])):
        seen.clear()
        injection.reference_by_region(case.q, case.own, case.references, biases, regions, attend)
        assert seen == masked


def test_tables_of_regions_are_made_once() -> None:
    like = torch.zeros(1)
    assert bias_table((3, 4), (0.0, 0.5), like) is bias_table((3, 4), (0.0, 0.5), like)
    assert bias_table((3, 4), (0.0, 0.5), like) is not bias_table((3, 4), (0.0, 0.4), like)
    assert strength_table((1.0, 0.5), like) is strength_table((1.0, 0.5), like)


def test_dense_keeps_the_number_type() -> None:
    """Weights of a router are wider than the attention that they weigh."""
    case = Case(2, 1, 5, 2, False)
    conditions = [None if c is None else c.to(case.q.bfloat16()) for c in case.conditions]
    weights = torch.rand(1, 3, 5, generator=torch.Generator().manual_seed(0))
    out = injection.clip_dense(case.q.bfloat16(), conditions, case.eta, weights, ATTEND)
    assert out.dtype == torch.bfloat16


def test_dense_passes_gradients_to_the_weights() -> None:
    case = Case(2, 1, 5, 2, False)
    weights = torch.rand(1, 3, 5, dtype=torch.float64, requires_grad=True)

    def function(w: Tensor) -> Tensor:
        return injection.clip_dense(case.q, case.conditions, case.eta, w, ATTEND)

    assert torch.autograd.gradcheck(function, (weights,))
