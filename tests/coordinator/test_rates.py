"""Token buckets: bursts, rates, and what is forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rates import KEYS_MAX, Buckets, network_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_then_the_rate() -> None:
    clock = Clock()
    buckets = Buckets(2.0, 10, clock)
    assert [buckets.take("a") for _ in range(10)] == [0.0] * 10
    assert buckets.take("a") == pytest.approx(0.5)
    assert buckets.take("b") == 0.0  # another's bucket
    clock.now += 0.5
    assert buckets.take("a") == 0.0
    assert buckets.take("a") > 0


@given(st.lists(st.floats(0, 3), max_size=200), st.floats(0.5, 20), st.integers(1, 30))
def test_no_more_than_burst_and_rate_allow_ever_pass(
    gaps: list[float], rate_s: float, burst: int
) -> None:
    clock = Clock()
    buckets = Buckets(rate_s, burst, clock)
    passed = 0
    for gap in gaps:
        clock.now += gap
        passed += buckets.take("a") == 0.0
        assert passed <= burst + rate_s * clock.now + 1e-6


def test_what_is_borrowed_is_waited_for() -> None:
    buckets = Buckets(10.0, 1, Clock())
    assert [buckets.spend("a") for _ in range(3)] == pytest.approx([0.0, 0.1, 0.2])


def test_no_rate_is_no_limit() -> None:
    buckets = Buckets(0.0, 0, Clock())
    assert {buckets.take("a") for _ in range(1000)} == {0.0}


def test_a_flood_of_addresses_takes_bounded_memory() -> None:
    buckets = Buckets(1.0, 1, Clock())
    for number in range(KEYS_MAX + 100):
        buckets.take(str(number))
    assert len(buckets._full_at) == KEYS_MAX


def test_one_party_has_a_whole_ipv6_network() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1")
    assert network_of("2001:db8::1") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:10.0.0.1") == network_of("10.0.0.1") == "10.0.0.1"
    assert network_of("fe80::1%eth0") == network_of("fe80::2")
    assert network_of("nonsense") == "nonsense"
