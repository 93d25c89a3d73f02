"""One federation at work: carries the round machine's actions out against store and sessions.

One task handles all events, so that what is on disk, what the machine believes and what devices are
told never part. A failing store ends the service: nothing is acknowledged that is not kept, and no
round goes on that is not written down.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import UnionType
from typing import Final, cast

from coordinator.arrivals import Arrivals, Arrived
from coordinator.asynchronous import AsynchronousMachine
from coordinator.base_version import BaseVersion
from coordinator.blocking import ReadAside, RunBlocking, StoreCalls
from coordinator.errors import StoreError
from coordinator.events import (
    Action,
    AddAssignment,
    Answer,
    Assign,
    CheckedIn,
    Closed,
    CloseRound,
    DropUpdate,
    Event,
    Expelled,
    Finish,
    GoBack,
    Left,
    Offered,
    OpenRound,
    Refused,
    Retry,
    TakeUpdate,
    Ticked,
)
from coordinator.happenings import Acted, Observer, unobserved
from coordinator.log import FederationLog
from coordinator.machine import Machine, Phase
from coordinator.replies import Replies
from coordinator.round_book import RoundBook
from coordinator.rounds import RoundMachine
from coordinator.screening import Bounds, Screening
from coordinator.settings_change import settings_change
from coordinator.store.base import Member, Snapshot, Store
from coordinator.uploads import Uploads
from coordinator.waiting import HOLD_S
from coordinator.wishes import Wishes
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
from protocol.tensors import NamedTensors

log = logging.getLogger("pf2lora.coordinator")

TICK_LATE_S: Final = 0.001


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
        read_aside: ReadAside,
        hold_s: float = HOLD_S,
        control_every_s: float = 0.0,
        clock: Callable[[], float] = time.time,
        observe: Observer = unobserved,
        bounds: Bounds = Bounds(),  # noqa: B008 - it is frozen
    ) -> None:
        """`control_every_s` is how often the store is asked for the operator's wishes; 0: never."""
        self.settings = settings
        self._start = start
        self._screening = Screening(store.devices, bounds)
        self._ranks: dict[str, int] = {}  # of connected devices, at their last check-in
        self._store = store
        self._rng = rng
        self._run_blocking = run_blocking
        self._hold_s = hold_s
        self._control_every_s = control_every_s
        self._call = StoreCalls(settings.name, run_blocking, read_aside)
        self._log = FederationLog(log, settings.name)
        self._wishes = Wishes(settings.name, store, self._call)
        self._controller: asyncio.Task[None] | None = None
        self._clock = clock
        self._observe = observe
        # Yet to be handled, and who is to know when they are.
        self._events: deque[tuple[Event, asyncio.Future[None] | None]] = deque()
        self._worker: asyncio.Task[None] | None = None  # while there is something to handle
        self._replies = Replies()
        self.uploads = Uploads(store, self._call)
        self._timer: asyncio.TimerHandle | None = None
        self._unfinished: set[str] = set()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self) -> None:
        """Begin, or go on from where the store stands.

        Raises:
            ConfigurationError: the store holds this federation with a setting that cannot change.
        """
        snapshot, how = await self._call(self._store.load), "goes on"
        if snapshot is None:
            how = "begins, new in this store"
            await self._run_blocking(partial(self._store.create, self.settings, self._start))
            snapshot = Snapshot(self.settings, 0, {}, self._start, None, frozenset(), {})
        elif snapshot.settings != self.settings:
            snapshot = await self._changed(snapshot)
        rounds = snapshot.rounds_done, self.settings.rounds.count
        log.info("%s %s: %d of %d rounds are done", self.settings.name, how, *rounds)
        self._restore(snapshot)
        await self.uploads.open()
        if snapshot.open_round:
            await self._book.go_on(snapshot.open_round)
        await self.look_at_control()
        await self._drive(Ticked())
        if self._control_every_s:
            self._controller = asyncio.get_running_loop().create_task(self._keep_looking())

    @property
    def finished(self) -> bool:
        return self._machine.phase is Phase.FINISHED

    @property
    def everyone_told(self) -> bool:
        """Whether every device that ever joined this process has the final adapter."""
        return self.finished and not self._unfinished

    def joined(self, device: str) -> None:
        """A device has come to take part."""
        self._unfinished.add(device)

    def has_all(self, device: str) -> None:
        """A device that was told the end has said goodbye: it has what it needs."""
        self._unfinished.discard(device)

    async def payload(self, digest: bytes) -> NamedTensors | None:
        """What was offered under this digest, as long as its base version is kept."""
        return self._base.offered(digest) or await self._call(self._store.base, digest)

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

    def shared(self, report: Report) -> Report:
        """The report with what is the same in all of them held once, however many wait."""
        return self._base.shared(report)

    async def offer(self, device: str, report: Report) -> Resume | Receipt:
        """Resume if the update is wanted, or the receipt of a report that is not."""
        given_in = self._machine.given_in(device, report.assignment)
        unfit = self._book.unfit(report, given_in) or self._screening.misfit(device, report)
        event = Refused(device, report.assignment, unfit) if unfit else None
        question = event or Offered(device, report.assignment)
        return cast(Resume | Receipt, await self._ask(device, question, Resume | Receipt))

    async def take(self, device: str, report: Report, update: NamedTensors) -> Message:
        """The receipt of a report whose update has come whole."""
        receipt = await self._ask(device, Arrived(device, report, update), Receipt)
        await self.uploads.forget(report.assignment)
        return receipt

    def expected(self) -> set[str]:
        """The devices that something waits for, wherever they are."""
        return self._machine.expected() | self._unfinished

    async def left(self, device: str) -> None:
        """The device's connection is gone."""
        self._forget(device)
        await self._drive(Left(device))

    async def expelled(self, device: str, reason: str) -> None:
        """The device is not connected (any more), and may not come back."""
        self._forget(device)
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
        async for event in self._wishes.news():
            await self._drive(event)

    async def _keep_looking(self) -> None:
        while not self.failure.done():
            await asyncio.sleep(self._control_every_s)
            try:
                await self.look_at_control()
            except Exception as error:
                self._fail(error)  # nobody would obey the operator from here on

    async def _ask(self, device: str, event: Event | Arrived, answers: type | UnionType) -> Message:
        reply = self._replies.expect(device, answers)
        self._tell(event)
        return await reply

    def _forget(self, device: str) -> None:
        self._replies.forget(device)
        self._ranks.pop(device, None)

    async def _drive(self, event: Event) -> None:
        """Have an event handled, and wait for that."""
        handled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tell(event, handled)
        await handled

    def _tell(self, event: Event | Arrived, handled: asyncio.Future[None] | None = None) -> None:
        """Have an event handled; `handled` is done when it is, or has failed."""
        if self.failure.done():
            raise ConnectionError("the coordinator is stopping")
        if isinstance(event, Arrived):
            self._arrivals.add(event)
        else:
            self._events.append((event, handled))
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Handle all that there is: one task, which no session's end stops halfway."""
        try:
            while self._arrivals or self._events:
                await self._handle_some()
                self._schedule_tick()
        except Exception as error:
            self._fail(error)  # the machine may believe what the store does not hold
        finally:
            self._worker = None

    def _fail(self, error: Exception) -> None:
        if self.failure.done():
            return
        self.failure.set_exception(error)
        self.failure.exception()  # nobody waits for it yet where it is opening that failed
        self._schedule_tick()  # there are none any more
        self._log.error("%s", error)
        whose = "'s store" if isinstance(error, StoreError) else ""
        self._replies.fail(ConnectionError(f"the coordinator{whose} has failed"))  # naming no file
        for _, handled in self._events:
            if handled and not handled.done():
                handled.set_exception(error)

    async def _handle_some(self) -> None:
        """Keep one lot of reports, then handle what has been asked: neither waits for all others.

        Each report that is kept lets one more be sent, and who sends holds memory until it is kept.
        """
        await self._handle(await self._keep_some())
        for _ in range(len(self._events)):
            event, handled = self._events[0]
            await self._handle([event])
            self._events.popleft()
            if handled and not handled.done():
                handled.set_result(None)

    async def _handle(self, some: Sequence[Event]) -> None:
        events = deque(some)
        while events:
            event = events.popleft()
            if isinstance(event, Refused):
                blame = partial(self._screening.count, event.device, event.assignment, event.reason)
                await self._run_blocking(blame)
            for action in self._machine.handle(event, self._clock()):
                following = await self._act(action)
                if following is not None:
                    events.append(following)

    async def _keep_some(self) -> list[Event]:
        # In a frame of its own: these updates must not be held while a round is aggregated.
        records, answers = self._arrivals.take_some()
        for answer in answers:
            await self._act(answer)
        return await self._arrivals.keep(records)

    async def _act(self, action: Action) -> Event | None:
        began = time.perf_counter()
        following = await self._carry_out(action)
        self._observe(Acted(self.settings.name, action, time.perf_counter() - began))
        return following

    async def _carry_out(self, action: Action) -> Event | None:
        match action:
            case OpenRound():
                await self._book.open(action)
            case AddAssignment(number, attempt, device, assignment, deadline_at):
                member = Member(device, assignment)
                await self._call(self._store.add_assignment, number, attempt, member, deadline_at)
            case Assign(device):
                self._replies.give(device, self._assignment(action))
            case Retry(device, after_s, spread_s, reason):
                self._replies.give(device, RetryWindow(after_s, spread_s, reason))
            case Finish(device):
                payload = self._base.offer(self._ranks.get(device, 0))
                told = Finished(self._machine.rounds_done, payload.digest, payload)
                self._replies.give(device, told)
            case TakeUpdate(device, _):
                self._replies.give(device, Resume(0))
            case DropUpdate(_, assignment):
                await self.uploads.forget(assignment)
            case Answer(device, assignment, status, reason):
                if status is ReceiptStatus.LATE:
                    status, reason = await self._late_or_kept(assignment, reason)
                self._replies.give(device, Receipt(assignment, status, reason))
            case CloseRound():
                await self._book.close(action)
                self.uploads.only(self._machine.awaited())
                return Closed(action.aggregate)
            case GoBack(number):
                return await self._book.go_back(number)
        return None

    async def _late_or_kept(self, assignment: str, reason: str) -> tuple[ReceiptStatus, str]:
        """A report that was counted, its receipt lost, is not late when it comes again.

        The machine remembers the open round alone; the store knows them all.
        """
        if await self._call(self._store.has_report, assignment):
            return ReceiptStatus.DUPLICATE, "it was kept before its round ended"
        return ReceiptStatus.LATE, reason

    def _assignment(self, given: Assign) -> Assignment:
        payload = self._base.offer(self._ranks.get(given.device, 0))
        # A clock that has been set back must not promise more than there ever was.
        left_s = min(max(0.0, given.deadline_at - self._clock()), self.settings.rounds.deadline_s)
        return Assignment(given.assignment, given.number, self._base.version, left_s, payload)

    async def _changed(self, snapshot: Snapshot) -> Snapshot:
        """Where it stands once the store has the settings that are given now."""
        for line in settings_change(snapshot.settings, self.settings):
            log.info("%s: %s", self.settings.name, line)
        record = snapshot.open_round
        if record:  # what it may still be, and what it may hold, followed from the earlier ones
            close = self._store.close_round
            await self._call(close, record.number, record.attempt, None, self._clock())
            log.warning("%s: round %d is abandoned for them", self.settings.name, record.number)
        await self._run_blocking(partial(self._store.change_settings, self.settings))
        return cast(Snapshot, await self._call(self._store.load))

    def _restore(self, snapshot: Snapshot) -> None:
        self._base = BaseVersion(self.settings, snapshot.base, snapshot.memory)
        asynchronous = self.settings.rounds.mode is Mode.ASYNCHRONOUS
        kind = AsynchronousMachine if asynchronous else RoundMachine
        self._machine: Machine = kind(snapshot, self._rng, hold_s=self._hold_s)
        self._book = RoundBook(snapshot, self._store, self._base, self._call, self._clock)
        self._arrivals = Arrivals(
            self.settings,
            self._store,
            self._machine,
            self._base,
            self._screening,
            self._run_blocking,
            self._clock,
        )

    def _schedule_tick(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        at = self._machine.next_tick_at()
        if at is not None and not self.failure.done():
            # Rather late than early: a timer that came too soon would be set anew at once.
            wait_s = max(0.0, at - self._clock()) + TICK_LATE_S
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._tell, Ticked())
