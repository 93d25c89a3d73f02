"""The Store contract: what must survive the coordinator.

Every call is synchronous and has its effect on the disk when it returns; the service runs them in
one thread of their own. Every call may raise StoreError: the store is damaged or cannot be written
(as where the disk is full), or holds nothing that the call could be about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Final, Protocol

import numpy as np

from coordinator.aggregation.staleness import staleness_factor
from coordinator.control import Control, Wish
from coordinator.store.devices import DeviceStore
from protocol.federation import FederationSettings
from protocol.messages import Metric
from protocol.tensors import Array, NamedTensors, TensorSpec, decoded, stretches

# How many base versions are kept to go back to.
BASES_KEPT: Final = 20


@dataclass(frozen=True, slots=True)
class Member:
    """A device of a round's cohort and its assignment."""

    device: str
    assignment: str


@dataclass(frozen=True, slots=True)
class Awaited:
    """An assignment that is awaited until a time of its own, and the base version it was given."""

    device: str
    assignment: str
    round: int
    deadline_at: float
    base_version: bytes


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A round that has been opened. Times are Unix seconds; `cohort` is who was asked in it."""

    number: int
    attempt: int
    base_version: bytes
    opened_at: float
    deadline_at: float | None
    cohort: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class ReportRecord:
    """A report that has been acknowledged, or is about to be.

    `round` and `attempt` are what it counts in; `staleness` is how many base versions there have
    been since its assignment's.
    With the device's key, `base_version` and `signature` prove it: protocol/signing.py.
    """

    assignment: str
    device: str
    round: int
    attempt: int
    examples: int
    metrics: tuple[Metric, ...]
    received_at: float
    update: NamedTensors
    base_version: bytes
    signature: bytes
    staleness: int = 0


@dataclass(frozen=True, slots=True)
class PartialUpdate:
    """Some of an update's bytes, the first of them at `begin`; `digest` is the whole payload's."""

    assignment: str
    digest: bytes
    begin: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where a federation stands: enough to go on from.

    `attempts` counts those at each round that is not done, also from before a roll-back;
    `reported` are the assignments whose reports are kept for the open round; `last_asked` has the
    latest round of each device, `memory` is the server step's.
    """

    settings: FederationSettings
    rounds_done: int
    attempts: Mapping[int, int]
    base: NamedTensors
    open_round: RoundRecord | None
    reported: frozenset[str]
    last_asked: Mapping[str, int]
    memory: NamedTensors | None = None
    awaited: tuple[Awaited, ...] = ()


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """A base version that is still kept: what there was after `number` rounds."""

    number: int
    version: bytes


class Outcome(Enum):
    """How a round ended."""

    AGGREGATED = "aggregated"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """A round that is over; `new_version` is None where it was abandoned."""

    number: int
    attempt: int
    outcome: Outcome
    reports: int
    opened_at: float
    closed_at: float
    base_version: bytes
    new_version: bytes | None


class Store(Protocol):
    """All federations of one coordinator."""

    @property
    def devices(self) -> DeviceStore:
        """Who may take part in them."""

    def create(self, settings: FederationSettings, start: NamedTensors) -> None:
        """Begin a federation from its first base version; its name must be new."""

    def change_settings(self, settings: FederationSettings) -> None:
        """Have these from now on, in the place of those that the federation of their name had."""

    def load(self, federation: str) -> Snapshot | None:
        """Where it stands; None if there is none of this name."""

    def open_round(self, federation: str, record: RoundRecord) -> None:
        """Write down that a round is open, and for whom."""

    def add_assignment(
        self,
        federation: str,
        number: int,
        attempt: int,
        member: Member,
        deadline_at: float | None = None,
    ) -> None:
        """Write down one more assignment of the open round.

        With a `deadline_at` it is awaited for itself, and no earlier one of its device is.
        """

    def keep_reports(self, federation: str, records: Sequence[ReportRecord]) -> list[bool]:
        """Keep reports for the open round, all or none; False where an assignment has one already.

        They are on the disk when this returns: only then may they be acknowledged. Together they
        cost one write to the disk.
        """

    def reports(self, federation: str, number: int, attempt: int) -> Iterator[ReportRecord]:
        """The kept reports of the open round, one in memory at a time, ordered by assignment."""

    def blocks(
        self, federation: str, number: int, attempt: int, begin: int, end: int
    ) -> Iterator[bytes]:
        """Bytes `[begin, end)` of the update buffers that `reports` would give, in its order."""

    def staleness(self, federation: str, number: int, attempt: int) -> list[int]:
        """That of each report that `reports` would give, in its order."""

    def keep_part(self, federation: str, part: PartialUpdate) -> None:
        """Keep a part of an update that is on its way; it is on the disk when this returns.

        Parts follow one another; one that begins at 0 takes the place of all before it. A part of
        what is not awaited is not kept. Parts go with their report's keeping, and with the round in
        which their assignment ceases to be awaited.
        """

    def parts(self, federation: str, assignment: str, digest: bytes) -> Iterator[bytes]:
        """What is kept of this update, in order; nothing if it is of another payload."""

    def drop_parts(self, federation: str, assignment: str) -> None:
        """Forget what is kept of this update."""

    def partial_updates(self, federation: str) -> list[str]:
        """The assignments of whose updates parts are kept."""

    def has_report(self, federation: str, assignment: str) -> bool:
        """Whether a report of this assignment has ever been kept, its round open or over."""

    def close_round(
        self,
        federation: str,
        number: int,
        attempt: int,
        new_base: NamedTensors | None,
        closed_at: float,
        memory: NamedTensors | None = None,
    ) -> None:
        """Write down the open round's end, all or nothing; None for a base abandons it.

        What was awaited for itself until `closed_at` or before is so no longer.
        `memory` is what the server's step remembers from round to round. The updates of its reports
        may be forgotten.
        """

    def control(self, federation: str) -> Control:
        """What the operator wants."""

    def set_wish(self, federation: str, wish: Wish) -> None:
        """Write down what the operator wants; a coordinator that runs will see it."""

    def set_roll_back(self, federation: str, number: int | None) -> None:
        """Ask for the base version after so many rounds, or (None) let go of that."""

    def bases(self, federation: str) -> list[BaseRecord]:
        """The base versions that are kept, oldest first; the last is the current one."""

    def base(self, federation: str, version: bytes) -> NamedTensors | None:
        """The base version of this digest, if it is kept."""

    def base_after(self, federation: str, number: int) -> NamedTensors | None:
        """The base version that there was after so many rounds, if it is kept."""

    def roll_back(self, federation: str, number: int) -> Snapshot:
        """Make the base version after `number` rounds the current one, and forget later ones.

        The request in `control` is answered with it, and no assignment is awaited any more. No
        round may be open.
        """

    def history(self, federation: str) -> list[RoundOutcome]:
        """The rounds that are over, in order."""

    def close(self) -> None:
        """Let go of what is held open."""


class StoredReports:
    """The kept reports of an open round as aggregation rules read them, block by block."""

    def __init__(
        self, store: Store, settings: FederationSettings, number: int, attempt: int
    ) -> None:
        self._store = store
        self._dtype = settings.update_dtype
        self._round = settings.name, number, attempt

    @property
    def count(self) -> int:
        return len(self._factors)

    @cached_property
    def _factors(self) -> Array:
        staleness = self._store.staleness(*self._round)
        return np.array([staleness_factor(one) for one in staleness], np.float32)

    @cached_property
    def _specs(self) -> tuple[TensorSpec, ...]:
        """The tensors of each: they fit the base version."""
        return next(self._store.reports(*self._round)).update.specs

    def block(self, begin: int, end: int) -> Array:
        block = np.empty((self.count, end - begin), np.float32)
        for place, row in zip(block, self._rows(begin, end), strict=True):
            place[:] = row
        if not np.all(self._factors == 1):
            block *= self._factors[:, None]
        return block

    def _rows(self, begin: int, end: int) -> Iterator[Array]:
        if self._dtype.is_plain:
            size = self._dtype.bytes_of(1)
            for row in self._store.blocks(*self._round, begin * size, end * size):
                yield decoded(row, self._dtype, end - begin)
        elif begin < end:
            # Of those tensors that have the coordinates, and of these the coordinates alone.
            wanted = stretches(self._specs, begin, end)
            first, last = wanted[0], wanted[-1]
            ends_at = last.offset + last.spec.size_bytes
            for row in self._store.blocks(*self._round, first.offset, ends_at):
                yield np.concatenate(
                    [one.decoded(row[one.offset - first.offset :]) for one in wanted]
                )
