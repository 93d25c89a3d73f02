"""A Store that forgets with its process: for simulations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from coordinator.store.base import (
    Outcome,
    ReportRecord,
    RoundOutcome,
    RoundRecord,
    Snapshot,
)
from protocol.federation import FederationSettings
from protocol.tensors import NamedTensors


@dataclass(slots=True)
class _Federation:
    settings: FederationSettings
    base: NamedTensors
    rounds_done: int = 0
    attempt: int = 0
    open_round: RoundRecord | None = None
    reports: dict[str, ReportRecord] = field(default_factory=dict)
    history: list[RoundOutcome] = field(default_factory=list)


class MemoryStore:
    """The Store contract on dictionaries."""

    def __init__(self) -> None:
        self._federations: dict[str, _Federation] = {}

    def create(self, settings: FederationSettings, start: NamedTensors) -> None:
        self._federations[settings.name] = _Federation(settings, start)

    def load(self, federation: str) -> Snapshot | None:
        found = self._federations.get(federation)
        if found is None:
            return None
        return Snapshot(
            found.settings,
            found.rounds_done,
            found.attempt,
            found.base,
            found.open_round,
            frozenset(found.reports),
        )

    def open_round(self, federation: str, record: RoundRecord) -> None:
        found = self._federations[federation]
        found.open_round, found.attempt = record, record.attempt

    def keep_report(self, federation: str, record: ReportRecord) -> bool:
        reports = self._federations[federation].reports
        if record.assignment in reports:
            return False
        reports[record.assignment] = record
        return True

    def reports(self, federation: str, number: int, attempt: int) -> Iterator[ReportRecord]:
        reports = self._federations[federation].reports
        for assignment in sorted(reports):
            record = reports[assignment]
            if (record.round, record.attempt) == (number, attempt):
                yield record

    def close_round(
        self,
        federation: str,
        number: int,
        attempt: int,
        new_base: NamedTensors | None,
        closed_at: float,
    ) -> None:
        found = self._federations[federation]
        if found.open_round is None:
            raise RuntimeError("no round is open")
        found.history.append(
            RoundOutcome(
                number,
                attempt,
                Outcome.AGGREGATED if new_base else Outcome.ABANDONED,
                len(found.reports),
                found.open_round.opened_at,
                closed_at,
                found.open_round.base_version,
                new_base.digest() if new_base else None,
            )
        )
        found.open_round = None
        found.reports.clear()
        if new_base:
            found.base, found.rounds_done, found.attempt = new_base, number, 0

    def history(self, federation: str) -> list[RoundOutcome]:
        found = self._federations.get(federation)
        return list(found.history) if found else []

    def close(self) -> None:
        pass
