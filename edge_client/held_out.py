"""Which of a device's rows are held out: never one that it was trained on, whatever rows there are.

What a row says decides, not where it is or its label. A state remembers what was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_client.data import Example
from edge_client.errors import ConfigurationError
from edge_client.private_store import DeviceState, Fact
from edge_client.splits import held_out_count, held_out_places

HELD_OUT: Final = 0.2
Digests = NDArray[np.uint64]
NO_DIGESTS: Final = np.empty(0, np.uint64)
_TRAINED_ROWS: Final = "trained_rows"


@dataclass(frozen=True, slots=True)
class Split:
    """The share of the rows that is held out, and the device's seed, which says which ones."""

    held_out: float
    seed: int


@dataclass(frozen=True, slots=True)
class Division:
    """A device's rows; `trained` has the digests of all it trains on or ever did, sorted."""

    training: list[Example]
    held_out: list[Example]
    trained: Digests


def split_of(state: DeviceState) -> Split:
    """What was held out of what it was trained on."""
    return Split(float(state.facts["held_out"] or 0), int(state.facts["seed"] or 0))


def with_split(state: DeviceState, split: Split, trained: Digests = NO_DIGESTS) -> DeviceState:
    """The same, trained on such rows."""
    facts: dict[str, Fact] = {"held_out": split.held_out, "seed": split.seed}
    return replace(
        state,
        groups={**state.groups, _TRAINED_ROWS: {"digests": trained}},
        facts={**state.facts, **facts},
    )


def choose_split(state: DeviceState | None, held_out: float | None, seed: int | None) -> Split:
    """What is asked for; where nothing is, what the state says.

    Raises:
        ConfigurationError: the seed is not that of what was learned.
    """
    before = split_of(state) if state else Split(HELD_OUT, 0)
    split = Split(
        before.held_out if held_out is None else held_out, before.seed if seed is None else seed
    )
    # HETLoRA's rank, and with it the adapter's shape, follows from the seed; so do the digests.
    if state is not None and state.steps_done and split.seed != before.seed:
        problem = f"is {split.seed}, and this device was trained with {before.seed}"
        raise ConfigurationError("seed", problem, f"{before.seed}, none, or another state folder")
    return split


def divide(
    rows: Sequence[Example],
    split: Split,
    state: DeviceState | None,
    progress: Callable[[str], None],
) -> Division:
    """Training and held-out rows of a device with this state.

    The share is of all rows; fewer are held out where no more are left that were not trained on.

    Raises:
        ConfigurationError: the share is outside [0, 1).
        DataError: there are too few rows to hold any out.
    """
    digests = _digests_of(rows, split.seed)
    trained = NO_DIGESTS
    if state is not None and state.steps_done:
        if _TRAINED_ROWS in state.groups:
            trained = state.groups[_TRAINED_ROWS]["digests"]
        else:
            progress(
                "an earlier version trained this device and did not say on which rows: taken to be "
                "those that it would have trained on of these"
            )
            trained = digests[~_held_out(rows, digests, split_of(state), NO_DIGESTS)]
    held = _held_out(rows, digests, split, trained)
    if split.held_out and not held.any():
        progress("no rows can be held out: all are trained on, or were before")
    return Division(
        [row for row, is_held in zip(rows, held, strict=True) if not is_held],
        [row for row, is_held in zip(rows, held, strict=True) if is_held],
        np.union1d(trained, digests[~held]),
    )


def _held_out(
    rows: Sequence[Example], digests: Digests, split: Split, trained: Digests
) -> NDArray[np.bool_]:
    """Which rows are held out, [n]: none that says what is trained on, or was.

    The order is that of the digests: rows that come later leave nearly all others where they were.
    """
    wanted = held_out_count(split.held_out, len(rows))
    place = held_out_places(
        rows, split.seed, lambda _, group: np.argsort(digests[group], kind="stable")
    )
    place[was_trained := np.isin(digests, trained)] = np.inf
    held = np.zeros(len(rows), np.bool_)
    held[np.argsort(place, kind="stable")[:wanted]] = True
    held &= ~was_trained
    # The same may stand in the file twice, also under another label.
    held &= ~np.isin(digests, digests[~held])
    return held


def _digests_of(rows: Sequence[Example], seed: int) -> Digests:
    """What each row says, whatever its label, as 8 bytes [n]: the front of a SHA-256."""
    said = (repr((seed, row.text, row.text_pair)).encode() for row in rows)
    fronts = b"".join(hashlib.sha256(one).digest()[:8] for one in said)
    return np.frombuffer(fronts, ">u8").astype(np.uint64)
