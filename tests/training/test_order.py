"""Which sample is drawn when: each as often as it should be, and the same whoever asks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from anystory_core.errors import ConfigError
from anystory_core.training.order import Order


def pools(*sizes: int) -> list[np.ndarray]:
    ends = np.cumsum((0, *sizes))
    return [np.arange(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def test_one_pool_is_gone_through_in_a_new_order_each_time() -> None:
    order = Order(pools(10), [1.0], 3)
    drawn = [order.position(p) for p in range(30)]
    epochs = [drawn[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[1] == np.random.default_rng((3, 2, 0, 1)).permutation(10).tolist()
    assert [Order(pools(10), [1.0], 4).position(p) for p in range(10)] != epochs[0]


@pytest.mark.parametrize("unit", [1, 4])
def test_each_pool_gets_its_share_and_each_sample_its_turn(unit: int) -> None:
    order = Order(pools(7, 50, 3), [0.5, 0.3, 0.2], 1, unit=unit)
    count = 12_000
    drawn = [order.position(p) for p in range(count)]
    which = [order.pool(p) for p in range(count)]
    assert which == [0 if x < 7 else 1 if x < 57 else 2 for x in drawn]
    for start in range(0, count, unit):
        assert len(set(which[start : start + unit])) == 1
    for pool, share in enumerate((0.5, 0.3, 0.2)):
        # Blocks of 4096 units hold their shares to one; the last is cut off at random: four
        # standard deviations of what is left of it.
        assert abs(which.count(pool) / count - share) < 4 * (0.25 * unit / count) ** 0.5
    for pool in pools(7, 50, 3):
        times = Counter(x for x in drawn if x in set(pool.tolist()))
        assert max(times.values()) - min(times.values()) <= 1  # none twice before all once


def test_equal_pools_have_orders_of_their_own() -> None:
    order = Order(pools(50, 50), [0.5, 0.5], 3)
    drawn = [order.position(p) for p in range(400)]
    one, other = ([x % 50 for x in drawn if x // 50 == pool][:50] for pool in (0, 1))
    assert sorted(one) == sorted(other) == list(range(50)) and one != other


def test_it_does_not_matter_who_asks_first() -> None:
    """Reader processes and resumed runs ask for numbers in any order."""
    numbers = [9000, 3, 12_000, 4, 8999]
    asked = Order(pools(7, 50), [0.4, 0.6], 1, unit=2)
    found = [asked.position(p) for p in numbers]
    for number, position in zip(numbers, found, strict=True):
        assert Order(pools(7, 50), [0.4, 0.6], 1, unit=2).position(number) == position


def test_empty_pools_and_shares_are_refused() -> None:
    for sizes, shares in (((0, 3), (0.5, 0.5)), ((2, 3), (0.0, 1.0))):
        with pytest.raises(ConfigError, match="every source"):
            Order(pools(*sizes), shares, 0)
