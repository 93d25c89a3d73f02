"""Writes down how each round begins and ends, and moves the base version with it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from coordinator.base_version import BaseVersion
from coordinator.blocking import StoreCalls
from coordinator.events import CloseRound, OpenRound, WentBack
from coordinator.log import FederationLog
from coordinator.store.base import Member, RoundRecord, Snapshot, Store, StoredReports
from protocol.messages import Report

log = logging.getLogger("pf2lora.coordinator")


class RoundBook:
    """One federation's, from where the store says it stands."""

    def __init__(
        self,
        snapshot: Snapshot,
        store: Store,
        base: BaseVersion,
        call: StoreCalls,
        clock: Callable[[], float],
    ) -> None:
        self._settings = snapshot.settings
        self._store = store
        self._base = base
        self._call = call
        self._clock = clock
        self._log = FederationLog(log, snapshot.settings.name)
        # The base versions that were given, by number of the round.
        self._versions = {one.round: one.base_version for one in snapshot.awaited}
        if snapshot.open_round:
            self._versions[snapshot.open_round.number] = snapshot.open_round.base_version

    async def go_on(self, record: RoundRecord) -> None:
        """Sum what was kept of an open round before a restart."""

        def add_all(federation: str) -> int:
            reports = self._store.reports(federation, record.number, record.attempt)
            return self._base.add_all(reports)

        kept = await self._call(add_all)
        about = {"round": record.number, "attempt": record.attempt}
        self._log.info("round %d goes on: %d reports are kept", record.number, kept, extra=about)

    async def open(self, action: OpenRound) -> None:
        """A round begins."""
        cohort = tuple(Member(device, assignment) for device, assignment in action.cohort)
        record = RoundRecord(
            action.number,
            action.attempt,
            self._base.version,
            self._clock(),
            action.deadline_at,
            cohort,
        )
        await self._call(self._store.open_round, record)
        self._versions[action.number] = self._base.version
        self._versions.pop(action.number - self._settings.rounds.staleness_max - 1, None)
        self._base.begin()
        asked = f": {len(cohort)} devices" if cohort else ""
        about = {"round": action.number, "attempt": action.attempt}
        self._log.info("round %d opened%s", action.number, asked, extra=about)

    async def close(self, action: CloseRound) -> None:
        """A round ends: aggregated, or abandoned."""
        number, attempt = action.number, action.attempt
        new_base = memory = None
        if action.aggregate:
            # What is kept for it changes no more, whoever reads it.
            new_base, memory = await self._call.aside(
                lambda store: self._base.following(
                    StoredReports(store, self._settings, number, attempt)
                )
            )
        await self._call(self._store.close_round, number, attempt, new_base, self._clock(), memory)
        about = {"round": number, "attempt": attempt}
        if new_base is None:
            least = self._settings.rounds.minimum_reports
            too_few = f"{action.reports} reports, rounds.minimum_reports is {least}"
            why = too_few if action.reports < least else "the operator goes back"
            self._log.warning("round %d abandoned: %s", number, why, extra=about)
            return
        self._base.move(new_base, memory)
        count = self._settings.rounds.count
        told = number, count, action.reports
        self._log.info("round %d of %d aggregated: %d reports", *told, extra=about)

    async def go_back(self, number: int) -> WentBack:
        """An earlier base version is the current one again."""
        snapshot = await self._call(self._store.roll_back, number)
        self._base.move(snapshot.base, snapshot.memory)
        self._log.warning("rolled back to the base version after round %d", number)
        return WentBack(snapshot.rounds_done, snapshot.attempts)

    def unfit(self, report: Report, given_in: int | None) -> str | None:
        """Why a report of an assignment of this round cannot be used whatever its bytes, if so."""
        misfit = self._base.misfit(report)
        if misfit:
            return misfit
        given = None if given_in is None else self._versions.get(given_in)
        if given is None:
            return None  # what is too old to be remembered is late, which the machine says
        if report.base_version != given:
            return "it was trained from another base version"
        if report.round != given_in:
            return f"it is of round {report.round}, its assignment of {given_in}"
        return None
