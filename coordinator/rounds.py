"""The round machine: events and a time in, actions out. No I/O, no clock, chance passed in.

    GATHERING --enough devices wait--> OPEN --goal reached, or deadline--> CLOSING --closed--> ...
        ^                                                                     |
        +--------- aggregated, or abandoned for want of reports --------------+--last--> FINISHED

The machine decides; events.py has what it is told and what it answers with.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from coordinator.control import Wish
from coordinator.events import (
    Action,
    Answer,
    AskedBack,
    Assign,
    CheckedIn,
    Closed,
    CloseRound,
    Event,
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
from protocol.federation import FederationSettings, Selection
from protocol.messages import ReceiptStatus

RETRY_AFTER_S = 1.0
RETRY_SPREAD_S = 2.0
# How long a device that is away for a moment (told to come back, or cut off) still counts as there.
AWAY_GRACE_S = 120.0
# With devices enough for the goal, how long a round waits for the rest of its cohort.
GATHER_S = 5.0


class Phase(Enum):
    """Where the federation stands."""

    GATHERING = auto()
    OPEN = auto()
    CLOSING = auto()
    FINISHED = auto()


@dataclass(slots=True)
class OpenState:
    """The round under way. `answered` holds the assignments that need no more waiting."""

    number: int
    attempt: int
    deadline_at: float
    cohort: dict[str, str]
    kept: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)

    def answered(self, assignment: str) -> bool:
        return assignment in self.kept or assignment in self.refused


class RoundMachine:
    """All rounds of one federation. Start it anew, or from what the store remembers."""

    def __init__(
        self,
        settings: FederationSettings,
        rng: random.Random,
        *,
        hold_s: float,
        rounds_done: int = 0,
        attempts: Mapping[int, int] | None = None,
        open_round: OpenState | None = None,
        last_asked: Mapping[str, int] | None = None,
    ) -> None:
        self._settings = settings
        self._rng = rng
        self._hold_s = hold_s
        self._waiting: dict[str, float] = {}  # device -> since when
        self._away: dict[str, float] = {}  # device that is expected back -> until when
        self._last_asked = dict(last_asked or {})  # device -> number of the round
        self._goal_since: float | None = None  # since when there are enough for the goal
        self._wish = Wish.RUN
        self._back_to: int | None = None  # as soon as the open round is closed
        self.rounds_done = rounds_done
        self._attempts = dict(attempts or {})  # how many there were, by number of the round
        self.open_round = open_round
        self.phase = Phase.OPEN if open_round else Phase.GATHERING
        if rounds_done >= settings.rounds.count:
            self.phase = Phase.FINISHED

    def next_tick_at(self) -> float | None:
        """When the machine next wants a Ticked, or None if only other events can move it."""
        times = [since + self._hold_s for since in self._waiting.values()]
        if self.phase is Phase.OPEN and self.open_round:
            times.append(self.open_round.deadline_at)
        if self.phase is Phase.GATHERING and self._goal_since is not None:
            times.append(self._goal_since + GATHER_S)
        return min(times, default=None)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; the actions are to be carried out in order."""
        match event:
            case CheckedIn(device):
                return self._check_in(device, now)
            case Left(device):
                if self._waiting.pop(device, None) is not None:
                    self._away[device] = now + AWAY_GRACE_S
                return []
            case Offered(device, assignment):
                receipt = self._settled(device, assignment)
                return [receipt] if receipt else [TakeUpdate(device, assignment)]
            case Uploaded(device, assignment):
                receipt = self._settled(device, assignment)
                return [receipt] if receipt else [Keep(device, assignment)]
            case Kept(device, assignment):
                self._opened().kept.add(assignment)
                accepted = Answer(device, assignment, ReceiptStatus.ACCEPTED, "")
                return [accepted, *self._close_if_due(now)]
            case Refused(device, assignment, reason):
                return self._refuse(device, assignment, reason, now)
            case Closed(aggregated):
                return self._closed(aggregated, now)
            case Ticked():
                due = [*self._close_if_due(now), *self._open_if_enough(now)]
                return [*due, *self._release_held(now)]

            case Wished(wish):
                return self._obey(wish, now)
            case AskedBack(number):
                self._back_to = number
                return self._close_now() if self.phase is Phase.OPEN else self._go_back()
            case WentBack(rounds_done):
                self.rounds_done = rounds_done
                self.phase = Phase.GATHERING
                return self._open_or_finish(now)

    def _obey(self, wish: Wish, now: float) -> list[Action]:
        self._wish = wish
        if self.phase is Phase.OPEN and wish is Wish.STOP:
            return self._close_now()
        if self.phase is Phase.FINISHED and wish is not Wish.STOP:
            self.phase = Phase.GATHERING  # stopped before, or told to by mistake
        return self._open_or_finish(now) if self.phase is Phase.GATHERING else []

    def _go_back(self) -> list[Action]:
        number, self._back_to = self._back_to, None
        return [] if number is None else [GoBack(number)]

    def _check_in(self, device: str, now: float) -> list[Action]:
        if self.phase is Phase.FINISHED:
            return [Finish(device)]
        round_ = self.open_round
        if round_ and self.phase is Phase.OPEN:
            assignment = round_.cohort.get(device)
            if assignment is not None and not round_.answered(assignment):
                return [Assign(device, assignment, round_.number, round_.deadline_at)]
        self._waiting[device] = now
        self._away.pop(device, None)
        return self._open_if_enough(now)

    def _open_if_enough(self, now: float) -> list[Action]:
        rounds = self._settings.rounds
        if self.phase is not Phase.GATHERING or self._wish is not Wish.RUN:
            return []
        self._away = {device: until for device, until in self._away.items() if now < until}
        available = sorted(self._waiting | self._away)
        if len(available) < rounds.goal:
            self._goal_since = None
            return []
        if self._goal_since is None:
            self._goal_since = now
        if len(available) < rounds.cohort and now < self._goal_since + GATHER_S:
            return []
        self._goal_since = None
        # Sorted, so that the choice depends on who is there and the seed, not on who came first.
        shuffled = self._rng.sample(available, len(available))
        if rounds.selection is Selection.LEAST_RECENT:
            shuffled.sort(key=lambda device: self._last_asked.get(device, 0))
        chosen = sorted(shuffled[: rounds.cohort])
        number = self.rounds_done + 1
        attempt = self._attempts[number] = self._attempts.get(number, 0) + 1
        self._last_asked |= dict.fromkeys(chosen, number)
        cohort = {device: self._assignment_id(number, attempt, device) for device in chosen}
        deadline_at = now + rounds.deadline_s
        self.open_round = OpenState(number, attempt, deadline_at, cohort)
        self.phase = Phase.OPEN
        # Who is away for a moment gets the assignment when it is back.
        present = [device for device in chosen if self._waiting.pop(device, None) is not None]
        return [
            OpenRound(number, attempt, deadline_at, tuple(cohort.items())),
            *(Assign(device, cohort[device], number, deadline_at) for device in present),
        ]

    def _assignment_id(self, number: int, attempt: int, device: str) -> str:
        text = f"{self._settings.name}/{number}/{attempt}/{device}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _settled(self, device: str, assignment: str) -> Answer | None:
        """The receipt of a report that need not be sent (again); None if it is wanted."""
        round_ = self.open_round
        if round_ is None or round_.cohort.get(device) != assignment:
            return Answer(device, assignment, ReceiptStatus.LATE, "its round is over")
        if assignment in round_.kept:
            return Answer(device, assignment, ReceiptStatus.DUPLICATE, "it is kept already")
        if assignment in round_.refused:
            reason = round_.refused[assignment]
            return Answer(device, assignment, ReceiptStatus.REJECTED, reason)
        if self.phase is not Phase.OPEN:
            return Answer(device, assignment, ReceiptStatus.LATE, "its round is being closed")
        return None

    def _refuse(self, device: str, assignment: str, reason: str, now: float) -> list[Action]:
        rejected = Answer(device, assignment, ReceiptStatus.REJECTED, reason)
        round_ = self.open_round
        if round_ is None or round_.cohort.get(device) != assignment:
            return [rejected]
        round_.refused[assignment] = reason
        return [rejected, *self._close_if_due(now)]

    def _close_if_due(self, now: float) -> list[Action]:
        if self.phase is not Phase.OPEN:
            return []
        round_ = self._opened()
        everyone = all(round_.answered(assignment) for assignment in round_.cohort.values())
        goal_reached = len(round_.kept) >= self._settings.rounds.goal
        if not everyone and not goal_reached and now < round_.deadline_at:
            return []
        return self._close_now()

    def _close_now(self) -> list[Action]:
        round_ = self._opened()
        self.phase = Phase.CLOSING
        enough = len(round_.kept) >= self._settings.rounds.minimum_reports
        aggregate = enough and self._back_to is None
        return [CloseRound(round_.number, round_.attempt, aggregate)]

    def _closed(self, aggregated: bool, now: float) -> list[Action]:
        self.open_round = None
        self.phase = Phase.GATHERING
        if aggregated:
            self.rounds_done += 1
        return self._go_back() or self._open_or_finish(now)

    def _open_or_finish(self, now: float) -> list[Action]:
        if self.rounds_done < self._settings.rounds.count and self._wish is not Wish.STOP:
            return self._open_if_enough(now)
        self.phase = Phase.FINISHED
        waiting, self._waiting = sorted(self._waiting), {}
        return [Finish(device) for device in waiting]

    def _release_held(self, now: float) -> list[Action]:
        due = [d for d, since in self._waiting.items() if now >= since + self._hold_s]
        # The more are sent away, the wider they are spread over time when they come back.
        spread_s = max(RETRY_SPREAD_S, len(due) / 100)
        for device in due:
            del self._waiting[device]
            self._away[device] = now + RETRY_AFTER_S + spread_s + AWAY_GRACE_S
        return [Retry(device, RETRY_AFTER_S, spread_s, self._why_wait()) for device in due]

    def _why_wait(self) -> str:
        if self._wish is Wish.PAUSE:
            return "the federation is paused"
        if self.phase is Phase.GATHERING:
            here = len(self._waiting | self._away)
            return f"waiting for devices: {here} of {self._settings.rounds.cohort} are here"
        return f"round {self.rounds_done + 1} is under way"

    def _opened(self) -> OpenState:
        if self.open_round is None:
            raise RuntimeError("no round is open")
        return self.open_round
