"""A state says which rows it was trained on, and nothing that was is held out afterwards."""

from __future__ import annotations

import pytest

from edge_client.errors import ConfigurationError
from edge_client.private_store import DeviceState
from edge_client.remembered import Split, choose_split, split_of, with_split


def _state(steps_done: int = 1) -> DeviceState:
    return DeviceState("f", "sha256:0", steps_done, steps_done, {})


def test_a_new_device_takes_what_it_is_given_or_the_usual() -> None:
    assert choose_split(None, None, None) == Split(0.2, 0)
    assert choose_split(None, 0, 7) == Split(0, 7)


def test_a_trained_one_takes_what_it_had_or_less() -> None:
    state = with_split(_state(), Split(0.25, 7))
    assert split_of(state) == Split(0.25, 7)
    assert choose_split(state, None, None) == choose_split(state, 0.25, 7) == Split(0.25, 7)
    assert choose_split(state, 0, None) == Split(0, 7)
    with pytest.raises(ConfigurationError, match=r"^held_out: is 0.5, and 0.25 .*use 0.25 at most"):
        choose_split(state, 0.5, None)
    with pytest.raises(ConfigurationError, match=r"^seed: is 0, and .* with 7.*; use 7, none, or"):
        choose_split(state, None, 0)


def test_before_any_training_all_is_open() -> None:
    state = with_split(_state(steps_done=0), Split(0.25, 7))
    assert choose_split(state, 0.5, 0) == Split(0.5, 0)
    assert choose_split(state, None, None) == Split(0.25, 7)
