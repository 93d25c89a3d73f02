"""A Store that forgets with its process: for simulations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from coordinator.control import Control, Wish
from coordinator.errors import StoreError
from coordinator.store.base import (
    BASES_KEPT,
    Awaited,
    BaseRecord,
    Member,
    Outcome,
    PartialUpdate,
    ReportRecord,
    RoundOutcome,
    RoundRecord,
    Snapshot,
)
from coordinator.store.memory_devices import MemoryDevices
from protocol.federation import FederationSettings
from protocol.tensors import NamedTensors


@dataclass(slots=True)
class _Federation:
    settings: FederationSettings
    rounds_done: int = 0
    attempts: dict[int, int] = field(default_factory=dict)
    open_round: RoundRecord | None = None
    reports: dict[str, ReportRecord] = field(default_factory=dict)
    memory: NamedTensors | None = None
    last_asked: dict[str, int] = field(default_factory=dict)
    control: Control = field(default_factory=Control)
    bases: dict[int, NamedTensors] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)  # assignments, of all rounds
    awaited: dict[str, Awaited] = field(default_factory=dict)  # by device
    parts: dict[str, list[PartialUpdate]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)  # assignments, of all rounds
    history: list[RoundOutcome] = field(default_factory=list)


class MemoryStore:
    """The Store contract on dictionaries."""

    def __init__(self) -> None:
        self._federations: dict[str, _Federation] = {}
        self.devices = MemoryDevices(self._asked)

    def create(self, settings: FederationSettings, start: NamedTensors) -> None:
        if settings.name in self._federations:
            raise StoreError(f"there is a federation {settings.name!r} already")
        self._federations[settings.name] = _Federation(settings, bases={0: start})

    def change_settings(self, settings: FederationSettings) -> None:
        self._found(settings.name).settings = settings

    def load(self, federation: str) -> Snapshot | None:
        found = self._federations.get(federation)
        if found is None:
            return None
        return Snapshot(
            found.settings,
            found.rounds_done,
            {n: count for n, count in found.attempts.items() if n > found.rounds_done},
            found.bases[found.rounds_done],
            found.open_round,
            frozenset(found.reports),
            dict(found.last_asked),
            found.memory,
            tuple(found.awaited[device] for device in sorted(found.awaited)),
        )

    def open_round(self, federation: str, record: RoundRecord) -> None:
        found = self._found(federation)
        made = {(outcome.number, outcome.attempt) for outcome in found.history}
        if found.open_round or (record.number, record.attempt) in made:
            raise StoreError(f"attempt {record.attempt} at round {record.number} was made already")
        found.open_round = record
        found.attempts[record.number] = record.attempt
        found.last_asked |= {member.device: record.number for member in record.cohort}
        found.given |= {member.assignment for member in record.cohort}

    def add_assignment(
        self,
        federation: str,
        number: int,
        attempt: int,
        member: Member,
        deadline_at: float | None = None,
    ) -> None:
        found = self._found(federation)
        record = self._opened(found, number, attempt)
        if member.assignment in found.given:
            raise StoreError(f"there is an assignment {member.assignment} already")
        found.open_round = replace(record, cohort=(*record.cohort, member))
        found.last_asked[member.device] = number
        found.given.add(member.assignment)
        if deadline_at is not None:
            found.awaited[member.device] = Awaited(
                member.device, member.assignment, number, deadline_at, record.base_version
            )

    def keep_reports(self, federation: str, records: Sequence[ReportRecord]) -> list[bool]:
        found = self._found(federation)
        for record in records:
            self._opened(found, record.round, record.attempt)
            if record.assignment not in found.given:
                raise StoreError(f"there is no assignment {record.assignment}")
        return [self._keep(found, record) for record in records]

    def reports(self, federation: str, number: int, attempt: int) -> Iterator[ReportRecord]:
        reports = self._found(federation).reports
        for assignment in sorted(reports):
            record = reports[assignment]
            if (record.round, record.attempt) == (number, attempt):
                yield record

    def blocks(
        self, federation: str, number: int, attempt: int, begin: int, end: int
    ) -> Iterator[bytes]:
        for report in self.reports(federation, number, attempt):
            yield bytes(report.update.buffer[begin:end])

    def keep_part(self, federation: str, part: PartialUpdate) -> None:
        found = self._found(federation)
        if part.assignment in self._awaited(found):
            before = found.parts.get(part.assignment, []) if part.begin else []
            found.parts[part.assignment] = [*before, part]

    def parts(self, federation: str, assignment: str, digest: bytes) -> Iterator[bytes]:
        parts = self._found(federation).parts.get(assignment, [])
        return iter([part.data for part in parts if part.digest == digest])

    def drop_parts(self, federation: str, assignment: str) -> None:
        self._found(federation).parts.pop(assignment, None)

    def partial_updates(self, federation: str) -> list[str]:
        return sorted(self._found(federation).parts)

    def staleness(self, federation: str, number: int, attempt: int) -> list[int]:
        return [report.staleness for report in self.reports(federation, number, attempt)]

    def has_report(self, federation: str, assignment: str) -> bool:
        return assignment in self._found(federation).kept

    def close_round(
        self,
        federation: str,
        number: int,
        attempt: int,
        new_base: NamedTensors | None,
        closed_at: float,
        memory: NamedTensors | None = None,
    ) -> None:
        found = self._found(federation)
        open_round = self._opened(found, number, attempt)
        found.history.append(
            RoundOutcome(
                number,
                attempt,
                Outcome.AGGREGATED if new_base else Outcome.ABANDONED,
                len(found.reports),
                open_round.opened_at,
                closed_at,
                open_round.base_version,
                new_base.digest() if new_base else None,
            )
        )
        found.open_round = None
        found.reports.clear()
        found.awaited = {d: one for d, one in found.awaited.items() if one.deadline_at > closed_at}
        awaited = self._awaited(found)
        found.parts = {name: part for name, part in found.parts.items() if name in awaited}
        if new_base:
            found.rounds_done = number
            found.memory = memory
            found.bases[number] = new_base
            found.bases.pop(number - BASES_KEPT, None)

    def control(self, federation: str) -> Control:
        found = self._federations.get(federation)
        return found.control if found else Control()

    def set_wish(self, federation: str, wish: Wish) -> None:
        found = self._found(federation)
        found.control = replace(found.control, wish=wish)

    def set_roll_back(self, federation: str, number: int | None) -> None:
        found = self._found(federation)
        found.control = replace(found.control, roll_back_to=number)

    def bases(self, federation: str) -> list[BaseRecord]:
        bases = self._found(federation).bases
        return [BaseRecord(number, base.digest()) for number, base in sorted(bases.items())]

    def base(self, federation: str, version: bytes) -> NamedTensors | None:
        bases = self._found(federation).bases.values()
        return next((base for base in bases if base.digest() == version), None)

    def base_after(self, federation: str, number: int) -> NamedTensors | None:
        return self._found(federation).bases.get(number)

    def roll_back(self, federation: str, number: int) -> Snapshot:
        found = self._found(federation)
        if number not in found.bases:
            raise StoreError(f"no base version of round {number} is kept")
        if found.open_round:
            raise StoreError("a round is open")
        found.rounds_done, found.memory = number, None
        found.awaited.clear()
        found.parts.clear()
        found.bases = {n: base for n, base in found.bases.items() if n <= number}
        found.control = Control(found.control.wish)
        snapshot = self.load(federation)
        assert snapshot is not None  # noqa: S101 - it was found above
        return snapshot

    def history(self, federation: str) -> list[RoundOutcome]:
        found = self._federations.get(federation)
        return list(found.history) if found else []

    def close(self) -> None:
        """Nothing is held; what is kept can still be asked for, as from a store opened again."""

    def _opened(self, found: _Federation, number: int, attempt: int) -> RoundRecord:
        record = found.open_round
        if record is None or (record.number, record.attempt) != (number, attempt):
            raise StoreError(f"attempt {attempt} at round {number} is not open")
        return record

    def _keep(self, found: _Federation, record: ReportRecord) -> bool:
        if record.assignment in found.kept:
            return False
        awaited = found.awaited.get(record.device)
        if awaited and awaited.assignment == record.assignment:
            del found.awaited[record.device]
        found.reports[record.assignment] = record
        found.kept.add(record.assignment)
        found.parts.pop(record.assignment, None)
        return True

    def _awaited(self, found: _Federation) -> set[str]:
        cohort = found.open_round.cohort if found.open_round else ()
        given = {member.assignment for member in cohort}
        return (given | {one.assignment for one in found.awaited.values()}) - found.kept

    def _asked(self) -> set[str]:
        return {device for found in self._federations.values() for device in found.last_asked}

    def _found(self, federation: str) -> _Federation:
        try:
            return self._federations[federation]
        except KeyError:
            raise StoreError(f"there is no federation {federation!r}") from None
