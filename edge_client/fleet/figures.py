"""What a load test has seen so far: counts, times, and what went wrong.

Percentiles are of all samples up to SAMPLES_MAX of a kind, and of as many drawn evenly from all
beyond that; the greatest is always that of all. So memory is bounded however long a test runs.
"""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from protocol.messages import ReceiptStatus

SAMPLES_MAX: Final = 100_000
PERCENTILES: Final = (50, 90, 95, 99)
# From dialling to a joined session; from a check-in to the assignment, told to come back or not;
# from there to the whole base version; from a report's announcement to its receipt. Resumed
# downloads and uploads are included.
LATENCIES: Final = ("connect", "check_in", "download", "upload")
MEASURED: Final = (*LATENCIES, "lag")
# As reports and thresholds call them.
TIMES: Final = tuple(
    f"{name}_{level}"
    for name in MEASURED
    for level in (*(f"p{percent}" for percent in PERCENTILES), "max")
)


class Samples:
    """Times of one kind, in seconds."""

    def __init__(self) -> None:
        self.count = 0
        self.max_s = 0.0
        self._kept = array("d")
        self._rng = random.Random(0)

    def add(self, time_s: float) -> None:
        """Take one more (reservoir sampling, Vitter 1985, algorithm R)."""
        self.count += 1
        self.max_s = max(self.max_s, time_s)
        if len(self._kept) < SAMPLES_MAX:
            self._kept.append(time_s)
        elif (place := self._rng.randrange(self.count)) < SAMPLES_MAX:
            self._kept[place] = time_s

    def percentile(self, percent: float) -> float | None:
        """The least sample that so many percent do not exceed; None without samples."""
        if not self._kept:
            return None
        return float(np.percentile(self._kept, percent, method="inverted_cdf"))

    def summary(self, name: str) -> dict[str, float | None]:
        """Percentiles and the greatest, by the names that thresholds have."""
        found = {f"{name}_p{p}": self.percentile(p) for p in PERCENTILES}
        return found | {f"{name}_max": self.max_s if self.count else None}


@dataclass(slots=True)
class Trouble:
    """How often something went wrong, and what was said the first time."""

    count: int
    first: str


@dataclass(slots=True)
class Figures:
    """Counts of one test, kept by all of its devices together."""

    connected: int = 0
    joined: int = 0
    resumed: int = 0
    assignments: int = 0
    dropouts: int = 0
    stragglers: int = 0
    accepted: int = 0
    late: int = 0
    rejected: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    errors: dict[str, Trouble] = field(default_factory=dict)
    latencies: Mapping[str, Samples] = field(
        default_factory=lambda: {name: Samples() for name in LATENCIES}
    )
    lag: Samples = field(default_factory=Samples)
    first_assigned_at: float | None = None
    last_receipt_at: float = 0.0
    began: asyncio.Event = field(default_factory=asyncio.Event)  # the first assignment came
    under_way: set[str] = field(default_factory=set)  # devices with work that has no receipt yet
    finished: bool = False
    _lately: dict[str, Samples] = field(default_factory=dict)
    _first_round: int = 0
    _round: int = 0

    @property
    def rounds(self) -> int:
        """How many rounds were closed, as far as devices are told: by the number of the next."""
        return self._round - self._first_round

    @property
    def error_count(self) -> int:
        return sum(trouble.count for trouble in self.errors.values())

    @property
    def updates_per_second(self) -> float:
        """Accepted reports, from the first assignment to the last receipt."""
        if self.first_assigned_at is None or not self.accepted:
            return 0.0
        return self.accepted / max(1e-9, self.last_receipt_at - self.first_assigned_at)

    def took(self, name: str, time_s: float) -> None:
        """Something took so long: one of MEASURED."""
        samples = self.lag if name == "lag" else self.latencies[name]
        samples.add(time_s)
        self._lately.setdefault(name, Samples()).add(time_s)

    def lately(self) -> dict[str, float]:
        """Of what ended since this was last asked: percentiles by the names that `values` has."""
        lately, self._lately = self._lately, {}
        summaries = [samples.summary(name) for name, samples in lately.items()]
        return {
            name: time_s for one in summaries for name, time_s in one.items() if time_s is not None
        }

    def assigned(self, round_number: int, now: float) -> None:
        """A device was given an assignment of this round."""
        self.assignments += 1
        if self.first_assigned_at is None:
            self.first_assigned_at = now
            self.began.set()
            self._first_round = round_number
        self._round = max(self._round, round_number)

    def told_the_end(self, rounds: int) -> None:
        """A device was told that no rounds are left, after so many of the federation's."""
        self.finished = True
        if self.first_assigned_at is not None:
            self._round = max(self._round, rounds + 1)

    def receipted(self, status: ReceiptStatus, now: float) -> None:
        """A report was answered; a duplicate's first receipt was lost on its way."""
        self.last_receipt_at = now
        match status:
            case ReceiptStatus.ACCEPTED | ReceiptStatus.DUPLICATE:
                self.accepted += 1
            case ReceiptStatus.LATE:
                self.late += 1
            case ReceiptStatus.REJECTED:
                self.rejected += 1

    def failed(self, kind: str, text: str) -> None:
        """Something went wrong."""
        trouble = self.errors.setdefault(kind, Trouble(0, text))
        trouble.count += 1

    def values(self) -> dict[str, float | None]:
        """All of it by name, as reports and thresholds have it; times in seconds."""
        found: dict[str, float | None] = {
            name: getattr(self, name)
            for name in (
                *("joined", "resumed", "rounds", "assignments", "accepted", "late", "rejected"),
                *("updates_per_second", "dropouts", "stragglers", "sent_bytes", "received_bytes"),
            )
        }
        found["errors"] = self.error_count
        for name, samples in (*self.latencies.items(), ("lag", self.lag)):
            found |= samples.summary(name)
        return found
