"""Every row is dealt once, and batches, each by itself, make whole epochs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.data import Example
from edge_client.errors import ConfigurationError, DataError
from edge_client.splits import batch_indices, hold_out, sample, split_by_skew

steady = settings(derandomize=True, deadline=None)


def _rows(labels: list[int]) -> list[Example]:
    return [Example(f"text {i}", None, label) for i, label in enumerate(labels)]


labels = st.lists(st.integers(0, 3), min_size=8, max_size=120)


@steady
@given(labels, st.integers(1, 8), st.floats(0, 1), st.integers(0, 5))
def test_skew_deals_every_row_once_in_even_parts(
    labels: list[int], devices: int, skew: float, seed: int
) -> None:
    parts = split_by_skew(_rows(labels), devices, skew, seed)
    assert Counter(row for part in parts for row in part) == Counter(_rows(labels))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == split_by_skew(_rows(labels), devices, skew, seed)


def test_more_skew_means_fewer_labels_a_device() -> None:
    rows = _rows([i % 2 for i in range(800)])

    def majority(skew: float) -> float:
        parts = split_by_skew(rows, 8, skew, 0)
        counts = [Counter(row.label for row in part) for part in parts]
        return float(np.mean([max(c.values()) / c.total() for c in counts]))

    assert majority(0.0) < 0.6
    assert majority(0.5) == pytest.approx(0.75, abs=0.05)
    assert majority(0.9) == pytest.approx(0.95, abs=0.03)


@steady
@given(labels, st.floats(0.05, 0.9), st.integers(0, 5))
def test_held_out_rows_have_the_label_mix_of_all(
    labels: list[int], share: float, seed: int
) -> None:
    training, held = hold_out(_rows(labels), share, seed)
    assert Counter(training) + Counter(held) == Counter(_rows(labels))
    assert training
    assert held
    for label, count in Counter(labels).items():
        dealt = sum(row.label == label for row in held)
        assert abs(dealt - count * len(held) / len(labels)) <= 2


@steady
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 30), st.integers(0, 3))
def test_batches_each_made_by_itself_cut_a_stream_of_whole_epochs(
    count: int, size: int, batches: int, seed: int
) -> None:
    whole = [batch_indices(count, size, number, seed) for number in range(batches)]
    assert all(len(batch) == size for batch in whole)
    stream = np.concatenate(whole)
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_out_of_bounds_is_refused_by_name() -> None:
    rows = _rows([0, 1])
    for call, field in (
        (lambda: split_by_skew(rows, 2, 1.5, 0), "skew"),
        (lambda: split_by_skew(rows, 3, 0.5, 0), "devices"),
        (lambda: hold_out(rows, 1.0, 0), "held_out"),
    ):
        with pytest.raises(ConfigurationError, match=field):
            call()
    with pytest.raises(DataError, match="one row"):
        hold_out(rows[:1], 0.5, 0)


def test_a_sample_has_the_labels_in_their_shares() -> None:
    rows = _rows([0] * 600 + [1] * 300 + [2] * 100)
    found = sample(rows, 50, 0)
    assert Counter(row.label for row in found) == {0: 30, 1: 15, 2: 5}
    assert found == sample(rows, 50, 0)
    assert sample(rows[:50], 50, 0) == rows[:50]


@steady
@given(labels, st.floats(0, 0.9), st.floats(0, 0.9))
def test_a_smaller_share_holds_out_some_of_the_rows_of_a_greater_one(
    labels: list[int], one: float, other: float
) -> None:
    few, more = (Counter(hold_out(_rows(labels), share, 3)[1]) for share in sorted((one, other)))
    assert few <= more
