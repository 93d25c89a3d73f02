"""Dealing rows: held-out parts, heterogeneous devices, and the endless stream of batches.

Everything here is a function of its arguments: the same seed gives the same deal on any machine.
"""

from __future__ import annotations

import hashlib
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import SupportsIndex, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_client.data import Example
from edge_client.errors import ConfigurationError, DataError

Row = TypeVar("Row")
Indices = NDArray[np.int64]


def seeded(*key: object) -> np.random.Generator:
    """A generator of its own for every key, alike on all platforms (Philox, keyed by SHA-256)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def check_share(share: float) -> None:
    """Refuse a share of held-out rows that is none.

    Raises:
        ConfigurationError: it is no number in [0, 1).
    """
    if not isinstance(share, float | int) or not 0 <= share < 1:
        raise ConfigurationError("held_out", f"{share!r} is no share", "a number in [0, 1)")


def whole_seed(seed: SupportsIndex) -> int:
    """The seed as Python's own number: what follows from it would not from NumPy's, as written.

    Raises:
        ConfigurationError: it is no whole number.
    """
    try:
        return operator.index(seed)
    except TypeError:
        raise ConfigurationError("seed", f"{seed!r} is none", "a whole number") from None


def hold_out(
    rows: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and held-out rows, each label divided alike as far as its count allows.

    Raises:
        ConfigurationError: the share is outside [0, 1).
        DataError: there are too few rows to hold any out.
    """
    wanted = held_out_count(share, len(rows))
    place = held_out_places(
        rows, seed, lambda label, group: seeded("hold_out", seed, label).permutation(len(group))
    )
    held = set(np.argsort(place, kind="stable")[:wanted].tolist())
    return (
        [row for index, row in enumerate(rows) if index not in held],
        [row for index, row in enumerate(rows) if index in held],
    )


def sample(rows: Sequence[Example], most: int, seed: int) -> list[Example]:
    """At most so many of the rows, each label's share as far as its count allows."""
    return list(rows) if len(rows) <= most else hold_out(rows, most / len(rows), seed)[1]


def held_out_count(share: float, count: int) -> int:
    """How many rows of so many are to be held out.

    Raises:
        ConfigurationError: the share is outside [0, 1).
        DataError: there are too few rows to hold any out.
    """
    check_share(share)
    if share == 0:
        return 0
    if count < 2:
        raise DataError(
            "one row cannot be divided into training and held-out rows; give more, or held_out 0"
        )
    return min(max(1, round(share * count)), count - 1)


def held_out_places(
    rows: Sequence[Example], seed: int, order_of: Callable[[int | None, Indices], Indices]
) -> NDArray[np.float64]:
    """Each row's place in [0, 1), [n]: what is lowest is held out first.

    Each label is spread evenly, its rows in the order that is given for their group.
    """
    place = np.empty(len(rows))
    for label, members in _by_label(rows).items():
        group = np.array(members)
        jitter = seeded("hold_out offset", seed, label).random()
        place[group[order_of(label, group)]] = (np.arange(len(group)) + jitter) / len(group)
    return place


def split_by_skew(
    rows: Sequence[Example], devices: int, skew: float, seed: int
) -> list[list[Example]]:
    """Deal rows to devices with label skew `s` in [0, 1].

    Of each label a share 1 - s goes to a shuffled pool that is dealt evenly; the rest is sorted by
    label and dealt in contiguous slices; device j gets slice j of both (the recipe of PF2LoRA's
    authors). At s = 0 devices are alike, at s = 1 each sees one or two labels.

    Raises:
        ConfigurationError: skew or number of devices is out of bounds.
    """
    if not 0 <= skew <= 1:
        raise ConfigurationError("skew", f"{skew} is out of bounds", "a number in [0, 1]")
    if not 1 <= devices <= len(rows):
        problem = f"{devices} for {len(rows)} rows"
        raise ConfigurationError("devices", problem, f"1 to {len(rows)}")
    pool: list[int] = []
    sorted_part: list[int] = []
    for label, members in sorted(_by_label(rows).items(), key=lambda item: str(item[0])):
        shuffled = seeded("skew", seed, label).permutation(np.array(members))
        cut = round((1 - skew) * len(members))
        pool += shuffled[:cut].tolist()
        sorted_part += shuffled[cut:].tolist()
    pool = seeded("skew pool", seed).permutation(np.array(pool, dtype=np.int64)).tolist()
    # Slices of the second part begin where those of the first left the remainder, so that sizes
    # differ by at most one.
    dealt = _slices(pool, devices, 0)
    rest = _slices(sorted_part, devices, len(pool) % devices)
    return [[rows[i] for i in a + b] for a, b in zip(dealt, rest, strict=True)]


def batch_indices(count: int, batch_size: int, number: int, seed: int) -> Indices:
    """Row numbers of the batch of this number, [batch_size].

    Batches cut one endless stream of epochs, each a permutation of its own, so that one depends on
    the seed and its number alone: training can stop and go on anywhere.
    """
    begin, end = number * batch_size, (number + 1) * batch_size
    first = begin // count
    epochs = range(first, -(-end // count))
    stream = np.concatenate([seeded("epoch", seed, epoch).permutation(count) for epoch in epochs])
    return stream[begin - first * count : end - first * count]


def _by_label(rows: Sequence[Example]) -> dict[int | None, list[int]]:
    members: dict[int | None, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        members[row.label].append(index)
    return members


def _slices(items: list[Row], devices: int, first: int) -> list[list[Row]]:
    """Contiguous slices, as even as can be; those from device `first` on get one more."""
    size, more = divmod(len(items), devices)
    longer = {(first + i) % devices for i in range(more)}
    slices, at = [], 0
    for device in range(devices):
        width = size + (device in longer)
        slices.append(items[at : at + width])
        at += width
    return slices
