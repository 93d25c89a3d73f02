"""What a device was ever trained on is not held out, and else a division stays what it was."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.data import Example
from edge_client.errors import ConfigurationError, DataError
from edge_client.held_out import Division, Split, choose_split, divide, split_of, with_split
from edge_client.private_store import DeviceState

steady = settings(derandomize=True, deadline=None)
# Few texts, so that files share rows and hold some twice, also under other labels.
row = st.builds(Example, st.integers(0, 40).map("text {}".format), st.none(), st.integers(0, 2))
files = st.lists(row, min_size=2, max_size=40)
shares = st.floats(0, 0.9)


class Device:
    """Divides its rows, and remembers what it was trained on."""

    def __init__(self) -> None:
        self.state: DeviceState | None = None
        self.lines: list[str] = []

    def divide(self, rows: list[Example], share: float) -> Division:
        return divide(rows, Split(share, 3), self.state, self.lines.append)

    def train(self, rows: list[Example], share: float) -> Division:
        division = self.divide(rows, share)
        self.state = with_split(_state(), Split(share, 3), division.trained)
        return division


def _state(steps_done: int = 1) -> DeviceState:
    return DeviceState("f", "sha256:0", steps_done, steps_done, {})


def _rows(name: str, count: int) -> list[Example]:
    return [Example(f"{name} {n}", None, n % 3) for n in range(count)]


def _texts(rows: list[Example]) -> set[str]:
    return {row.text for row in rows}


@steady
@given(st.lists(st.tuples(files, shares), max_size=4), files, shares)
def test_no_row_is_held_out_that_was_trained_on_from_any_file(
    before: list[tuple[list[Example], float]], rows: list[Example], share: float
) -> None:
    device, trained = Device(), set[str]()
    for file, its_share in before:
        trained |= _texts(device.train(file, its_share).training)
    device.lines.clear()
    found = device.divide(rows, share)
    assert Counter(found.training + found.held_out) == Counter(rows)
    assert found.training
    assert not _texts(found.held_out) & (trained | _texts(found.training))
    assert len(found.trained) == len(trained | _texts(found.training))
    assert len(found.held_out) <= max(1, round(share * len(rows)))
    assert (len(device.lines) == 1) == (share > 0 and not found.held_out)


@steady
@given(files, shares, shares)
def test_a_device_that_has_trained_divides_the_same_rows_as_before(
    rows: list[Example], share: float, other: float
) -> None:
    device = Device()
    before = device.train(rows, share)
    for same in (share, max(share, other)):  # there are no more to be held out
        again = device.divide(rows, same)
        assert (again.training, again.held_out) == (before.training, before.held_out)
    fewer = device.divide(rows, min(share, other))
    assert Counter(fewer.held_out) <= Counter(before.held_out)


def test_of_rows_that_come_later_the_same_share_is_held_out() -> None:
    device, rows, later = Device(), _rows("early", 300), _rows("late", 300)
    before = device.train(rows, 0.2)
    held = device.divide(later[:150] + rows + later[150:], 0.2).held_out
    assert len(held) == 120
    assert len(_texts(held) & _texts(before.held_out)) >= 50
    assert all(abs(count - 40) <= 1 for count in Counter(row.label for row in held).values())
    assert len(device.divide(later, 0.2).held_out) == 60
    assert len(device.divide(rows + later[:10], 0.5).held_out) == 70


def test_a_row_has_the_digest_that_states_remember() -> None:
    rows = [Example("a", None, 0), Example("a", None, 1), Example("a", "b", 0)]
    found = divide(rows, Split(0, 7), None, print).trained
    assert found.tolist() == [5491617693435098983, 7145002921317554814]


def test_rows_of_a_state_that_does_not_know_them_are_those_that_it_would_have_trained_on() -> None:
    device, rows = Device(), _rows("early", 300)
    before = device.train(rows, 0.2)
    assert device.state is not None
    facts = device.state.facts
    device.state = DeviceState("f", "sha256:0", 1, 1, {}, facts)
    for share in (0.2, 0.5):
        found = device.divide(rows, share)
        assert (found.held_out, found.trained.tolist()) == (
            before.held_out,
            before.trained.tolist(),
        )
        assert "did not say on which rows" in device.lines.pop()
    device.state = DeviceState("f", "sha256:0", 0, 0, {}, facts)
    assert len(device.divide(rows, 0.5).held_out) == 150
    assert not device.lines


def test_one_row_is_refused_unless_none_is_to_be_held_out() -> None:
    assert len(divide(_rows("a", 1), Split(0, 0), None, print).training) == 1
    with pytest.raises(DataError, match="one row cannot be divided"):
        divide(_rows("a", 1), Split(0.2, 0), None, print)


def test_a_new_device_takes_what_it_is_given_or_the_usual() -> None:
    assert choose_split(None, None, None) == Split(0.2, 0)
    assert choose_split(None, 0, 7) == Split(0, 7)


def test_a_trained_one_takes_what_it_had_or_another_share() -> None:
    state = with_split(_state(), Split(0.25, 7), np.array([2**64 - 1], np.uint64))
    assert split_of(state) == Split(0.25, 7)
    assert choose_split(state, None, None) == choose_split(state, 0.25, 7) == Split(0.25, 7)
    assert choose_split(state, 0, None) == Split(0, 7)
    assert choose_split(state, 0.5, None) == Split(0.5, 7)
    with pytest.raises(ConfigurationError, match=r"^seed: is 0, and .* with 7; use 7, none, or"):
        choose_split(state, None, 0)


def test_before_any_training_all_is_open() -> None:
    state = with_split(_state(steps_done=0), Split(0.25, 7))
    assert choose_split(state, 0.5, 0) == Split(0.5, 0)
    assert choose_split(state, None, None) == Split(0.25, 7)
