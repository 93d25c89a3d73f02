"""Reports that have come whole: those that are wanted are kept together, then summed.

Nobody waits for company: what comes while one transaction is written goes into the next.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from coordinator.aggregation.base import UpdateError
from coordinator.base_version import BaseVersion
from coordinator.blocking import RunBlocking
from coordinator.events import Action, Event, Keep, Kept, Refused, Uploaded
from coordinator.log import FederationLog
from coordinator.machine import Machine
from coordinator.screening import Screening
from coordinator.store.base import ReportRecord, Store
from protocol.federation import FederationSettings
from protocol.messages import Report
from protocol.tensors import NamedTensors

log = logging.getLogger("pf2lora.coordinator")

# Reports in one transaction: enough to share a flush to the disk, few enough to be soon done.
KEPT_TOGETHER_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class Arrived:
    """An update that has come whole."""

    device: str
    report: Report
    update: NamedTensors


class Arrivals:
    """Those of one federation that are yet to be handled."""

    def __init__(
        self,
        settings: FederationSettings,
        store: Store,
        machine: Machine,
        base: BaseVersion,
        screening: Screening,
        run_blocking: RunBlocking,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._store = store
        self._machine = machine
        self._base = base
        self._screening = screening
        self._run_blocking = run_blocking
        self._clock = clock
        self._log = FederationLog(log, settings.name)
        self._queue: deque[Arrived] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, arrived: Arrived) -> None:
        """Queue one."""
        self._queue.append(arrived)

    def take_some(self) -> tuple[list[ReportRecord], list[Action]]:
        """The next that are to be kept together, and the answers to those that are not wanted."""
        records: list[ReportRecord] = []
        answers: list[Action] = []
        for _ in range(min(len(self._queue), KEPT_TOGETHER_MAX, self._missing())):
            arrived = self._queue.popleft()
            event = Uploaded(arrived.device, arrived.report.assignment)
            for action in self._machine.handle(event, self._clock()):
                if isinstance(action, Keep):
                    records.append(self._record(arrived))
                else:
                    answers.append(action)
        return records, answers

    async def keep(self, records: list[ReportRecord]) -> list[Event]:
        """Keep them in one transaction; what became of each."""
        if not records:
            return []
        reasons = await self._run_blocking(partial(self._keep_and_sum, records))
        kept: list[tuple[str, str]] = []
        refused: list[Event] = []
        for record, reason in zip(records, reasons, strict=True):
            if reason is None:
                about = {"round": record.round, "device": record.device}
                self._log.info("round %d: report of %s", *about.values(), extra=about)
                kept.append((record.device, record.assignment))
            else:
                refused.append(Refused(record.device, record.assignment, reason))
        # What is kept comes first: a refusal may be the last that the round waits for.
        return [Kept(tuple(kept)), *refused] if kept else refused

    def _missing(self) -> int:
        """How many more reports may be kept at once without there being too many."""
        open_round = self._machine.open_round
        kept = len(open_round.kept) if open_round else 0
        return max(1, self._settings.rounds.goal - kept)

    def _record(self, arrived: Arrived) -> ReportRecord:
        report = arrived.report
        open_round = self._machine.open_round
        given_in = self._machine.given_in(arrived.device, report.assignment)
        if open_round is None or given_in is None:
            raise RuntimeError("a report without a round")
        return ReportRecord(
            report.assignment,
            arrived.device,
            open_round.number,
            open_round.attempt,
            report.examples,
            report.metrics,
            self._clock(),
            arrived.update,
            report.base_version,
            report.signature,
            open_round.number - given_in,
        )

    def _keep_and_sum(self, records: list[ReportRecord]) -> list[str | None]:
        """Why the aggregate does not take an update; None for those that are kept and summed."""
        reasons = [self._unusable(record.update) for record in records]
        usable = [r for r, reason in zip(records, reasons, strict=True) if reason is None]
        kept = self._store.keep_reports(self._settings.name, usable) if usable else []
        for record, is_new in zip(usable, kept, strict=True):
            if is_new:
                self._base.add(record)
        return reasons

    def _unusable(self, update: NamedTensors) -> str | None:
        try:
            self._base.check(update)
            self._screening.check(update)
        except UpdateError as error:
            return str(error)
        return None
