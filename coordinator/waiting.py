"""Devices that have checked in and are held until there is an answer for them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from coordinator.events import Retry
from protocol.federation import Selection

HOLD_S: Final = 60.0
RETRY_AFTER_S: Final = 1.0
RETRY_SPREAD_S: Final = 2.0


class Waiting:
    """Who waits, and since when. After `hold_s` a device is told to come back later."""

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._since: dict[str, float] = {}  # who has waited longest comes first

    def __iter__(self) -> Iterator[str]:
        return iter(self._since)

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, device: str) -> bool:
        return device in self._since

    def add(self, device: str, now: float) -> None:
        self._since.pop(device, None)
        self._since[device] = now

    def bring_near(self, now: float) -> None:
        """Nobody has come later than now."""
        self._since = {device: min(since, now) for device, since in self._since.items()}

    def remove(self, device: str) -> bool:
        """Whether it was waiting."""
        return self._since.pop(device, None) is not None

    def release(self, now: float, reason: str) -> list[Retry]:
        """Send away those that have been held for long enough."""
        held = itertools.takewhile(lambda one: now >= one[1] + self._hold_s, self._since.items())
        due = [device for device, _ in held]
        # The more are sent away, the wider they are spread over time when they come back.
        spread_s = max(RETRY_SPREAD_S, len(due) / 100)
        for device in due:
            del self._since[device]
        return [Retry(device, RETRY_AFTER_S, spread_s, reason) for device in due]

    def next_release_at(self) -> float | None:
        longest_since = next(iter(self._since.values()), None)
        return None if longest_since is None else longest_since + self._hold_s


def in_order_of_choice(
    devices: Iterable[str],
    selection: Selection,
    last_asked: Mapping[str, int],
    rng: random.Random,
) -> list[str]:
    """The devices, those that are to be asked first in front; `last_asked` has rounds' numbers."""
    # Sorted, so that the choice depends on who is there and the seed, not on who came first.
    available = sorted(devices)
    shuffled = rng.sample(available, len(available))
    if selection is Selection.LEAST_RECENT:
        shuffled.sort(key=lambda device: last_asked.get(device, 0))
    return shuffled
