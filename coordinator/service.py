"""One federation at work: carries the round machine's actions out against store and sessions.

Every event passes through one lock, so that what is on disk, what the machine believes and what
devices are told never part. A failing store ends the service: nothing is acknowledged that is not
kept, and no round goes on that is not written down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Any, Final, TypeVar, cast

from coordinator.aggregation.base import UpdateError
from coordinator.asynchronous import AsynchronousMachine
from coordinator.base_version import BaseVersion
from coordinator.control import Control
from coordinator.errors import ConfigurationError
from coordinator.events import (
    Action,
    AddAssignment,
    Answer,
    AskedBack,
    Assign,
    CheckedIn,
    Closed,
    CloseRound,
    DropUpdate,
    Event,
    Expelled,
    Finish,
    GoBack,
    Keep,
    Kept,
    Left,
    Offered,
    OpenRound,
    Refused,
    Retry,
    TakeUpdate,
    Ticked,
    Uploaded,
    WentBack,
    Wished,
)
from coordinator.happenings import Acted, Observer, unobserved
from coordinator.log import FederationLog
from coordinator.machine import Machine, Phase
from coordinator.replies import Replies
from coordinator.rounds import RoundMachine
from coordinator.screening import Bounds, Screening
from coordinator.store.base import (
    Member,
    ReportRecord,
    RoundRecord,
    Snapshot,
    Store,
    StoredReports,
)
from coordinator.uploads import RunBlocking, Uploads
from protocol.federation import FederationSettings, Mode
from protocol.messages import (
    Assignment,
    Finished,
    Message,
    Receipt,
    ReceiptStatus,
    Report,
    Resume,
    RetryWindow,
)
from protocol.tensors import NamedTensors, Payload

log = logging.getLogger("pf2lora.coordinator")

TICK_LATE_S: Final = 0.001
# Reports in one transaction: enough to share a flush to the disk, few enough to be soon done.
KEPT_TOGETHER_MAX: Final = 16

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Arrived:
    """An update that has come whole."""

    device: str
    report: Report
    update: NamedTensors


class FederationService:
    """Sessions ask, the machine decides, this carries out."""

    def __init__(
        self,
        settings: FederationSettings,
        start: NamedTensors,
        store: Store,
        *,
        rng: random.Random,
        run_blocking: RunBlocking,
        hold_s: float = 20.0,
        control_every_s: float = 0.0,
        clock: Callable[[], float] = time.time,
        observe: Observer = unobserved,
        bounds: Bounds = Bounds(),  # noqa: B008 - it is frozen
    ) -> None:
        """`control_every_s` is how often the store is asked for the operator's wishes; 0: never."""
        self.settings = settings
        self._log = FederationLog(log, settings.name)
        self._start = start
        self._screening = Screening(store.devices, bounds)
        self._ranks: dict[str, int] = {}  # of devices, as they said at their last check-in
        self._store = store
        self._rng = rng
        self._run_blocking = run_blocking
        self._hold_s = hold_s
        self._control_every_s = control_every_s
        self._control = Control()
        self._controller: asyncio.Task[None] | None = None
        self._clock = clock
        self._observe = observe
        self._lock = asyncio.Lock()
        self._events: deque[Event] = deque()  # yet to be handled
        self._arrived: deque[_Arrived] = deque()  # likewise; apart, to be kept together
        self._replies = Replies()
        self.uploads = Uploads(settings.name, store, run_blocking)
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._unfinished: set[str] = set()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self) -> None:
        """Begin, or go on from where the store stands.

        Raises:
            ConfigurationError: the store holds this federation with other settings.
        """
        snapshot = await self._run_blocking(partial(self._store.load, self.settings.name))
        if snapshot is None:
            create = partial(self._store.create, self.settings, self._start)
            await self._run_blocking(create)
            snapshot = Snapshot(self.settings, 0, {}, self._start, None, frozenset(), {})
        elif snapshot.settings != self.settings:
            raise ConfigurationError(
                "name",
                f"the store holds a federation {self.settings.name!r} with other settings; "
                "choose another name or another store",
            )
        self._restore(snapshot)
        await self.uploads.open()
        if snapshot.open_round:
            await self._resum(snapshot.open_round)
        await self.look_at_control()
        await self._drive(Ticked())
        if self._control_every_s:
            self._controller = asyncio.get_running_loop().create_task(self._keep_looking())

    @property
    def finished(self) -> bool:
        return self._machine.phase is Phase.FINISHED

    @property
    def everyone_told(self) -> bool:
        """Whether every device that ever joined this process knows that the rounds are over."""
        return self.finished and not self._unfinished

    def joined(self, device: str) -> None:
        """A device has come to take part."""
        self._unfinished.add(device)

    async def payload(self, digest: bytes) -> NamedTensors | None:
        """What was offered under this digest, as long as its base version is kept."""
        return self._base.offered(digest) or await self._write(self._store.base, digest)

    def ineligible(self, device: str, examples: int) -> str | None:
        """Why a device with so many examples cannot take part, if so."""
        least = self.settings.rounds.minimum_examples
        if examples < least:
            return f"the device has {examples} examples, the federation asks for {least}"
        return self._screening.ineligible(device, examples)

    async def check_in(self, device: str, rank: int) -> Message:
        """Assignment, RetryWindow or Finished; may take as long as a device is held."""
        self._ranks[device] = min(rank, self.settings.adapter.rank)
        return await self._ask(device, CheckedIn(device), Assignment | RetryWindow | Finished)

    async def offer(self, device: str, report: Report) -> Resume | Receipt:
        """Resume if the update is wanted, or the receipt of a report that is not."""
        unfit = self._unfit(device, report) or self._screening.misfit(device, report)
        event = Refused(device, report.assignment, unfit) if unfit else None
        question = event or Offered(device, report.assignment)
        return cast(Resume | Receipt, await self._ask(device, question, Resume | Receipt))

    async def take(self, device: str, report: Report, update: NamedTensors) -> Message:
        """The receipt of a report whose update has come whole."""
        receipt = await self._ask(device, _Arrived(device, report, update), Receipt)
        await self.uploads.forget(report.assignment)
        return receipt

    async def left(self, device: str) -> None:
        """The device's connection is gone."""
        self._replies.forget(device)
        await self._drive(Left(device))

    async def expelled(self, device: str, reason: str) -> None:
        """The device's connection is gone, and it may not come back."""
        self._replies.forget(device)
        self._unfinished.discard(device)
        await self._drive(Expelled(device, reason))

    def close(self) -> None:
        """Stop the timer; the store is the caller's."""
        if self._timer:
            self._timer.cancel()
        if self._controller:
            self._controller.cancel()

    async def look_at_control(self) -> None:
        """Obey what the operator has written into the store."""
        control = await self._write(self._store.control)
        before, self._control = self._control, control
        if control.wish is not before.wish:
            self._log.info("the operator's wish: %s", control.wish.value)
            await self._drive(Wished(control.wish))
        if control.roll_back_to is None:
            return
        kept = {base.number for base in await self._write(self._store.bases)}
        if control.roll_back_to in kept:
            await self._drive(AskedBack(control.roll_back_to))
        else:
            self._log.error("cannot roll back to round %d: not kept any more", control.roll_back_to)
            await self._write(self._store.set_control, Control(control.wish))

    async def _keep_looking(self) -> None:
        with contextlib.suppress(ConnectionError):  # the service has failed, and says so itself
            while True:
                await asyncio.sleep(self._control_every_s)
                await self.look_at_control()

    # --- events in, actions out ---------------------------------------------------------------

    async def _ask(
        self, device: str, event: Event | _Arrived, answers: type | UnionType
    ) -> Message:
        reply = self._replies.expect(device, answers)
        await self._drive(event)
        return await reply

    async def _drive(self, event: Event | _Arrived) -> None:
        # In a task of its own: a session that is cancelled must not stop a change halfway.
        task = asyncio.get_running_loop().create_task(self._drive_whole(event))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def _drive_whole(self, event: Event | _Arrived) -> None:
        if isinstance(event, _Arrived):
            self._arrived.append(event)
        else:
            self._events.append(event)
        async with self._lock:
            if self.failure.done():
                raise ConnectionError("the coordinator is stopping")
            try:
                # Whoever has the lock handles what the others have left meanwhile.
                while self._arrived or self._events:
                    await self._handle_next()
            except Exception as error:
                # The machine may now believe what the store does not hold: go no further.
                self.failure.set_exception(error)
                raise
        self._schedule_tick()

    async def _handle_next(self) -> None:
        if self._arrived:
            events = deque(await self._keep_arrived())
        else:
            events = deque([self._events.popleft()])
        while events:
            event = events.popleft()
            if isinstance(event, Refused):
                count = partial(self._screening.count, event.device, event.assignment, event.reason)
                await self._run_blocking(count)
            for action in self._machine.handle(event, self._clock()):
                following = await self._act(action)
                if following is not None:
                    events.append(following)

    async def _keep_arrived(self) -> list[Event]:
        """Keep what has come, as much of it as is wanted, in one transaction.

        Nobody waits for company: what comes while one transaction is written goes into the next.
        """
        records = []
        for _ in range(min(len(self._arrived), KEPT_TOGETHER_MAX, self._missing())):
            arrived = self._arrived.popleft()
            event = Uploaded(arrived.device, arrived.report.assignment)
            for action in self._machine.handle(event, self._clock()):
                if isinstance(action, Keep):
                    records.append(self._record(arrived))
                else:
                    await self._act(action)
        return await self._keep(records) if records else []

    def _missing(self) -> int:
        """How many more reports may be kept at once without there being too many."""
        open_round = self._machine.open_round
        kept = len(open_round.kept) if open_round else 0
        return max(1, self.settings.rounds.goal - kept)

    async def _act(self, action: Action) -> Event | None:
        began = time.perf_counter()
        following = await self._carry_out(action)
        self._observe(Acted(self.settings.name, action, time.perf_counter() - began))
        return following

    async def _carry_out(self, action: Action) -> Event | None:
        match action:
            case OpenRound():
                await self._open_round(action)
            case AddAssignment(number, attempt, device, assignment, deadline_at):
                member = Member(device, assignment)
                await self._write(self._store.add_assignment, number, attempt, member, deadline_at)
            case Assign(device, assignment, number, deadline_at):
                self._replies.give(
                    device, self._assignment(device, assignment, number, deadline_at)
                )
            case Retry(device, after_s, spread_s, reason):
                self._replies.give(device, RetryWindow(after_s, spread_s, reason))
            case Finish(device):
                payload = self._payload_for(device)
                rounds = self._machine.rounds_done
                self._unfinished.discard(device)
                self._replies.give(device, Finished(rounds, payload.digest, payload))
            case TakeUpdate(device, _):
                self._replies.give(device, Resume(0))
            case DropUpdate(_, assignment):
                await self.uploads.forget(assignment)
            case Answer(device, assignment, status, reason):
                if status is ReceiptStatus.LATE:
                    status, reason = await self._late_or_kept(assignment, reason)
                self._replies.give(device, Receipt(assignment, status, reason))
            case CloseRound(number, attempt, aggregate):
                await self._close_round(number, attempt, aggregate)
                return Closed(aggregate)
            case GoBack(number):
                return await self._go_back(number)
        return None

    async def _go_back(self, number: int) -> Event:
        snapshot = await self._write(self._store.roll_back, number)
        self._base.move(snapshot.base, snapshot.memory)
        self._log.warning("rolled back to the base version after round %d", number)
        return WentBack(snapshot.rounds_done, snapshot.attempts)

    async def _late_or_kept(self, assignment: str, reason: str) -> tuple[ReceiptStatus, str]:
        """A report that was counted, its receipt lost, is not late when it comes again.

        The machine remembers the open round alone; the store knows them all.
        """
        if await self._write(self._store.has_report, assignment):
            return ReceiptStatus.DUPLICATE, "it was kept before its round ended"
        return ReceiptStatus.LATE, reason

    def _assignment(
        self, device: str, assignment: str, number: int, deadline_at: float
    ) -> Assignment:
        payload = self._payload_for(device)
        remaining_s = max(0.0, deadline_at - self._clock())
        return Assignment(assignment, number, self._base.version, remaining_s, payload)

    def _payload_for(self, device: str) -> Payload:
        return self._base.offer(self._ranks.get(device, 0))

    async def _open_round(self, action: OpenRound) -> None:
        cohort = tuple(Member(device, assignment) for device, assignment in action.cohort)
        record = RoundRecord(
            action.number,
            action.attempt,
            self._base.version,
            self._clock(),
            action.deadline_at,
            cohort,
        )
        await self._write(self._store.open_round, record)
        self._versions[action.number] = self._base.version
        self._versions.pop(action.number - self.settings.rounds.staleness_max - 1, None)
        self._base.begin()
        asked = f": {len(cohort)} devices" if cohort else ""
        about = {"round": action.number, "attempt": action.attempt}
        self._log.info("round %d opened%s", action.number, asked, extra=about)

    async def _keep(self, records: list[ReportRecord]) -> list[Event]:
        """What became of each: it is kept, or cannot be used."""
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

    def _record(self, arrived: _Arrived) -> ReportRecord:
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
        kept = self._store.keep_reports(self.settings.name, usable) if usable else []
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

    async def _close_round(self, number: int, attempt: int, aggregate: bool) -> None:
        new_base = memory = None
        if aggregate:
            kept = StoredReports(self._store, self.settings, number, attempt)
            new_base, memory = await self._run_blocking(partial(self._base.following, kept))
        await self._write(self._store.close_round, number, attempt, new_base, self._clock(), memory)
        self.uploads.only(self._machine.awaited())
        about = {"round": number, "attempt": attempt}
        if new_base is None:
            self._log.warning("round %d abandoned: too few reports", number, extra=about)
            return
        self._base.move(new_base, memory)
        count = self.settings.rounds.count
        self._log.info("round %d of %d aggregated", number, count, extra=about)

    async def _write(self, call: Callable[..., Result], *args: Any) -> Result:
        return await self._run_blocking(partial(call, self.settings.name, *args))

    # --- state --------------------------------------------------------------------------------

    def _restore(self, snapshot: Snapshot) -> None:
        self._base = BaseVersion(self.settings, snapshot.base, snapshot.memory)
        self._versions = {one.round: one.base_version for one in snapshot.awaited}
        if snapshot.open_round:
            self._versions[snapshot.open_round.number] = snapshot.open_round.base_version
        asynchronous = self.settings.rounds.mode is Mode.ASYNCHRONOUS
        kind = AsynchronousMachine if asynchronous else RoundMachine
        self._machine: Machine = kind(snapshot, self._rng, hold_s=self._hold_s)

    async def _resum(self, record: RoundRecord) -> None:
        def add_all() -> int:
            reports = self._store.reports(self.settings.name, record.number, record.attempt)
            return self._base.add_all(reports)

        kept = await self._run_blocking(add_all)
        about = {"round": record.number, "attempt": record.attempt}
        self._log.info("round %d goes on: %d reports are kept", record.number, kept, extra=about)

    def _unfit(self, device: str, report: Report) -> str | None:
        """Why this report cannot be used whatever its bytes, if so."""
        misfit = self._base.misfit(report)
        if misfit:
            return misfit
        given_in = self._machine.given_in(device, report.assignment)
        given = None if given_in is None else self._versions.get(given_in)
        if given is None:
            return None  # what is too old to be remembered is late, which the machine says
        if report.base_version != given:
            return "it was trained from another base version"
        if report.round != given_in:
            return f"it is of round {report.round}, its assignment of {given_in}"
        return None

    def _schedule_tick(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        at = self._machine.next_tick_at()
        if at is not None and not self.failure.done():
            loop = asyncio.get_running_loop()
            # Rather late than early: a timer that came too soon would be set anew at once.
            self._timer = loop.call_later(max(0.0, at - self._clock()) + TICK_LATE_S, self._tick)

    def _tick(self) -> None:
        task = asyncio.get_running_loop().create_task(self._drive_whole(Ticked()))
        self._tasks.add(task)
        task.add_done_callback(self._ticked)

    def _ticked(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it is with `self.failure` already, where the server waits for it
