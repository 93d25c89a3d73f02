"""The average is right, and the same bytes in any order."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation.base import UpdateError
from coordinator.aggregation.fedavg import FedAvg
from protocol.limits import COHORT_MAX, EXAMPLES_MAX
from protocol.tensors import NamedTensors

BASE = NamedTensors.from_arrays({"A": np.linspace(-1, 1, 40, dtype=np.float32).reshape(4, 10)})


def _update(seed: int, scale: float = 0.01) -> NamedTensors:
    values = np.random.default_rng(seed).standard_normal(40).astype(np.float32) * scale
    return NamedTensors.from_flat(BASE.specs, values.astype(np.float32))


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, EXAMPLES_MAX), min_size=1, max_size=12), st.randoms())
def test_any_order_gives_the_same_bytes_and_the_weighted_mean(
    weights: list[int], rng: random.Random
) -> None:
    reports = [(_update(i), weight) for i, weight in enumerate(weights)]
    shuffled = list(reports)
    rng.shuffle(shuffled)
    results = []
    for order in (reports, shuffled):
        strategy = FedAvg(BASE, 12 * EXAMPLES_MAX)
        for update, weight in order:
            strategy.accumulate(update, weight)
        results.append(strategy.finalize())
    assert results[0].buffer == results[1].buffer
    updates = np.stack([update.flat() for update, _ in reports]).astype(np.float64)
    wanted = BASE.flat() + np.average(updates, 0, weights)
    assert np.abs(results[0].flat() - wanted).max() < 1e-7


def test_the_largest_round_cannot_overflow() -> None:
    total = COHORT_MAX * EXAMPLES_MAX
    strategy = FedAvg(BASE, total)
    most = NamedTensors.from_flat(BASE.specs, np.full(40, 16.0, np.float32))
    strategy.accumulate(most, total)
    assert np.abs(strategy.finalize().flat() - (BASE.flat() + 16.0)).max() < 1e-4


def test_nothing_added_is_the_base() -> None:
    assert FedAvg(BASE, 10).finalize().buffer == BASE.buffer


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 16.1])
def test_what_cannot_be_averaged_is_refused_and_leaves_the_sum_alone(value: float) -> None:
    strategy = FedAvg(BASE, 10)
    strategy.accumulate(_update(1), 2)
    before = strategy.finalize().buffer
    flat = _update(2).flat().copy()
    flat[7] = value
    with pytest.raises(UpdateError, match="finite"):
        strategy.check(NamedTensors.from_flat(BASE.specs, flat))
    with pytest.raises(UpdateError, match="weight"):
        strategy.accumulate(_update(2), 9)
    other = NamedTensors.from_arrays({"B": np.zeros((4, 10), np.float32)})
    with pytest.raises(UpdateError, match="tensors"):
        strategy.check(other)
    assert strategy.finalize().buffer == before
