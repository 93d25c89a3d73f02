"""Counts, percentiles and rounds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.fleet import figures as figures_module
from edge_client.fleet.figures import Figures, Samples


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.sampled_from([50, 90, 99]))
def test_percentiles_are_of_all_samples(times: list[float], percent: int) -> None:
    samples = Samples()
    for time_s in times:
        samples.add(time_s)
    found = samples.percentile(percent)
    assert found in times
    assert sum(time_s <= found for time_s in times) >= len(times) * percent / 100
    assert sum(time_s < found for time_s in times) < len(times) * percent / 100
    assert samples.max_s == max(times)


def test_many_samples_are_drawn_from_evenly_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(figures_module, "SAMPLES_MAX", 2000)
    samples, rng = Samples(), random.Random(3)
    for _ in range(50_000):
        samples.add(rng.random())
    samples.add(7.0)
    assert len(samples._kept) == 2000
    assert samples.count == 50_001
    assert samples.max_s == 7.0
    assert samples.percentile(50) == pytest.approx(0.5, abs=0.05)
    assert samples.percentile(95) == pytest.approx(0.95, abs=0.03)


def test_nothing_is_known_without_samples() -> None:
    assert set(Samples().summary("upload").values()) == {None}


def test_rounds_are_counted_from_where_the_test_came_in() -> None:
    figures = Figures()
    for number in (17, 17, 18, 17, 19):
        figures.assigned(number, 1.0)
    assert figures.rounds == 2
    figures.told_the_end(19)
    assert figures.rounds == 3


def test_times_of_late_are_those_since_they_were_last_asked_for() -> None:
    figures = Figures()
    for time_s in (1.0, 2.0, 3.0):
        figures.took("upload", time_s)
    figures.took("lag", 0.1)
    found = figures.lately()
    assert (found["upload_p50"], found["upload_p95"], found["upload_max"]) == (2.0, 3.0, 3.0)
    assert found["lag_max"] == 0.1
    assert not any(name.startswith("check_in") for name in found)
    figures.took("upload", 9.0)
    assert figures.lately()["upload_p50"] == 9.0
    assert figures.lately() == {}
    values = figures.values()
    assert (values["upload_p50"], values["upload_max"], values["lag_max"]) == (2.0, 9.0, 0.1)
