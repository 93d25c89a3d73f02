"""What synchronous and asynchronous rounds share: events and a time in, actions out.

    GATHERING ---------opens---------> OPEN ---------is due---------> CLOSING ----closed----> ...
        ^                                                                |
        +-------- aggregated, or abandoned for want of reports ----------+--last--> FINISHED

No I/O, no clock, chance passed in. The machine decides; events.py has what it is told and what it
answers with. When a round opens, who is asked and when it is due is each kind's own: rounds.py has
the synchronous one, asynchronous.py the buffered one.
"""

from __future__ import annotations

import hashlib
import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum, auto

from coordinator.control import Wish
from coordinator.events import (
    Action,
    Answer,
    AskedBack,
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
    Refused,
    Retry,
    TakeUpdate,
    Ticked,
    Uploaded,
    WentBack,
    Wished,
)
from coordinator.store.base import Snapshot
from coordinator.waiting import Waiting
from protocol.messages import ReceiptStatus


class Phase(Enum):
    """Where the federation stands."""

    GATHERING = auto()
    OPEN = auto()
    CLOSING = auto()
    FINISHED = auto()


@dataclass(slots=True)
class RoundState:
    """The round under way: which of the assignments that count in it have been answered."""

    number: int
    attempt: int
    kept: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)

    def answered(self, assignment: str) -> bool:
        return assignment in self.kept or assignment in self.refused


class Machine(ABC):
    """All rounds of one federation, from where the store says it stands."""

    def __init__(self, snapshot: Snapshot, rng: random.Random, *, hold_s: float) -> None:
        self._settings = snapshot.settings
        self._rng = rng
        self._waiting = Waiting(hold_s)
        self._last_asked = dict(snapshot.last_asked)  # device -> number of the round
        self._attempts = dict(snapshot.attempts)  # how many there were, by number of the round
        self._wish = Wish.RUN
        self._back_to: int | None = None  # as soon as the open round is closed
        self._now = math.inf  # when the last event was; what is restored has times of any clock
        self.rounds_done = snapshot.rounds_done
        self.open_round: RoundState | None = None
        record = snapshot.open_round
        if record:
            self.open_round = RoundState(record.number, record.attempt, set(snapshot.reported))
        self.phase = Phase.OPEN if record else Phase.GATHERING
        if self.rounds_done >= self._settings.rounds.count:
            self.phase = Phase.FINISHED

    @abstractmethod
    def next_tick_at(self) -> float | None:
        """When the machine next wants a Ticked, or None if only other events can move it."""

    @abstractmethod
    def given_in(self, device: str, assignment: str) -> int | None:
        """The round in which this assignment was given; None if it is not awaited."""

    @abstractmethod
    def awaited(self) -> set[str]:
        """The assignments whose reports may still be taken."""

    @abstractmethod
    def expected(self) -> set[str]:
        """The devices that it counts on, here or away: for a report, or for the next round."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; the actions are to be carried out in order."""
        if now < self._now:
            self._bring_near(now)
        self._now = now
        match event:
            case CheckedIn(device):
                finished = self.phase is Phase.FINISHED
                return [Finish(device)] if finished else self._check_in(device, now)
            case Left(device):
                self._leave(device, now)
                return []
            case Expelled(device, reason):
                assignment = self._expel(device)
                if assignment is None:
                    return self._proceed(now)
                self._opened().refused[assignment] = reason
                self._answered(device, assignment)
                return [DropUpdate(device, assignment), *self._proceed(now)]
            case Offered(device, assignment):
                receipt = self._settled(device, assignment, now)
                return [receipt] if receipt else [TakeUpdate(device, assignment)]
            case Uploaded(device, assignment):
                receipt = self._settled(device, assignment, now)
                return [receipt] if receipt else [Keep(device, assignment)]
            case Kept(reports):
                accepted = [self._accept(device, assignment) for device, assignment in reports]
                return [*accepted, *self._proceed(now)]
            case Refused(device, assignment, reason):
                if self.given_in(device, assignment) is not None:
                    self._opened().refused[assignment] = reason
                    self._answered(device, assignment)
                rejected = Answer(device, assignment, ReceiptStatus.REJECTED, reason)
                return [rejected, *self._proceed(now)]
            case Ticked():
                return [*self._proceed(now), *self._release_held(now)]
            case Closed(aggregated):
                return self._closed(aggregated, now)
            case Wished(wish):
                return self._obey(wish, now)
            case AskedBack(number):
                self._back_to = number
                return self._close_now() if self.phase is Phase.OPEN else self._go_back()
            case WentBack(rounds_done, attempts):
                self.rounds_done, self._attempts = rounds_done, dict(attempts)
                self.phase = Phase.GATHERING
                return self._went_back(now)

    # --- each kind's own ----------------------------------------------------------------------

    @abstractmethod
    def _check_in(self, device: str, now: float) -> list[Action]:
        """Answer a device, or let it wait; rounds are left."""

    @abstractmethod
    def _bring_near(self, now: float) -> None:
        """Let nothing last longer than if it began now: the clock may have been set back."""

    @abstractmethod
    def _leave(self, device: str, now: float) -> None:
        """Note that a device's connection is gone."""

    @abstractmethod
    def _answered(self, device: str, assignment: str) -> None:
        """Note that a report of this assignment is kept or refused."""

    @abstractmethod
    def _expel(self, device: str) -> str | None:
        """Forget a device for good; its assignment, if that is awaited."""

    @abstractmethod
    def _settled(self, device: str, assignment: str, now: float) -> Answer | None:
        """The receipt of a report that need not be sent (again); None if it is wanted."""

    @abstractmethod
    def _proceed(self, now: float) -> list[Action]:
        """Whatever is due: open a round, ask devices, close it."""

    @abstractmethod
    def _why_wait(self) -> str:
        """What to tell a device that has waited in vain."""

    def _release_held(self, now: float) -> list[Retry]:
        paused = self._wish is Wish.PAUSE
        reason = "the federation is paused" if paused else self._why_wait()
        return self._waiting.release(now, reason)

    # --- from round to round ------------------------------------------------------------------

    def _obey(self, wish: Wish, now: float) -> list[Action]:
        self._wish = wish
        if self.phase is Phase.OPEN:
            return self._close_now() if wish is Wish.STOP else self._proceed(now)
        if self.phase is Phase.FINISHED and wish is not Wish.STOP:
            self.phase = Phase.GATHERING  # stopped before, or told to by mistake
        return self._proceed_or_finish(now) if self.phase is Phase.GATHERING else []

    def _accept(self, device: str, assignment: str) -> Answer:
        self._opened().kept.add(assignment)
        self._answered(device, assignment)
        return Answer(device, assignment, ReceiptStatus.ACCEPTED, "")

    def _begin_round(self) -> RoundState:
        number = self.rounds_done + 1
        attempt = self._attempts[number] = self._attempts.get(number, 0) + 1
        self.open_round = RoundState(number, attempt)
        self.phase = Phase.OPEN
        return self.open_round

    def _close_now(self) -> list[Action]:
        round_ = self._opened()
        self.phase = Phase.CLOSING
        enough = len(round_.kept) >= self._settings.rounds.minimum_reports
        aggregate = enough and self._back_to is None
        return [CloseRound(round_.number, round_.attempt, aggregate, len(round_.kept))]

    def _closed(self, aggregated: bool, now: float) -> list[Action]:
        self.open_round = None
        self.phase = Phase.GATHERING
        if aggregated:
            self.rounds_done += 1
        return self._go_back() or self._proceed_or_finish(now)

    def _go_back(self) -> list[Action]:
        number, self._back_to = self._back_to, None
        return [] if number is None else [GoBack(number)]

    def _went_back(self, now: float) -> list[Action]:
        return self._proceed_or_finish(now)

    def _proceed_or_finish(self, now: float) -> list[Action]:
        if self.rounds_done < self._settings.rounds.count and self._wish is not Wish.STOP:
            return self._proceed(now)
        self.phase = Phase.FINISHED
        told = list(self._waiting)
        for device in told:
            self._waiting.remove(device)
        return [Finish(device) for device in told]

    def _assignment_id(self, device: str, *rest: object) -> str:
        round_ = self._opened()
        parts = (self._settings.name, round_.number, round_.attempt, device, *rest)
        return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:32]

    def _opened(self) -> RoundState:
        if self.open_round is None:
            raise RuntimeError("no round is open")
        return self.open_round
