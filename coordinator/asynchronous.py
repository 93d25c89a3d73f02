"""Asynchronous rounds, buffered (FedBuff, arXiv 2106.06639): nobody waits for the slowest.

A device that checks in trains the newest base version at once, as long as no more than a cohort are
at it. A round is a buffer: it is due when it holds `report_goal` reports, whichever base versions
they come from, and its aggregate is the next base version. Each assignment is awaited until its own
deadline, over the rounds; a report of more than `staleness_max` base versions ago is late.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Final

from coordinator.control import Wish
from coordinator.events import Action, AddAssignment, Answer, Assign, OpenRound
from coordinator.machine import Machine, Phase
from coordinator.store.base import Snapshot
from coordinator.waiting import in_order_of_choice
from protocol.messages import ReceiptStatus

OVER: Final = "its assignment is over"


@dataclass(frozen=True, slots=True)
class Given:
    """A device's assignment under way, and the round in which it was given."""

    assignment: str
    number: int
    deadline_at: float


class AsynchronousMachine(Machine):
    """All buffers of one federation; one is always open, until the last."""

    def __init__(self, snapshot: Snapshot, rng: random.Random, *, hold_s: float) -> None:
        super().__init__(snapshot, rng, hold_s=hold_s)
        # In the order of their deadlines, so that no event looks at all of them: each that is given
        # ends later than those before it, also where the clock is set back (_bring_near).
        self._under_way = {
            one.device: Given(one.assignment, one.round, one.deadline_at)
            for one in sorted(snapshot.awaited, key=lambda one: one.deadline_at)
        }
        # Of those under way, who waits all the same, with nothing to show for it.
        self._empty_handed: set[str] = set()
        # How many assignments were given in the open round: no two get the same id.
        self._given = len(snapshot.open_round.cohort) if snapshot.open_round else 0
        self._refused_devices: set[str] = set()  # in the open round: they wait for the next

    def next_tick_at(self) -> float | None:
        times = [self._waiting.next_release_at()]
        if self.phase is Phase.OPEN and self._waiting and self._under_way:
            times.append(next(iter(self._under_way.values())).deadline_at)
        return min((time for time in times if time is not None), default=None)

    def given_in(self, device: str, assignment: str) -> int | None:
        given = self._under_way.get(device)
        ours = self.open_round and given and given.assignment == assignment
        return given.number if given and ours else None

    def awaited(self) -> set[str]:
        return {given.assignment for given in self._under_way.values()}

    def expected(self) -> set[str]:
        return set(self._under_way) if self.open_round else set()

    def _check_in(self, device: str, now: float) -> list[Action]:
        given = self._under_way.get(device)
        if given and given.number == self._opened().number and now < given.deadline_at:
            return [self._assign(device)]
        if given:  # the newest base version is for it, too
            self._empty_handed.add(device)
        self._waiting.add(device, now)
        return self._proceed(now)

    def _bring_near(self, now: float) -> None:
        self._waiting.bring_near(now)
        latest = now + self._settings.rounds.deadline_s
        self._under_way = {
            device: replace(given, deadline_at=min(given.deadline_at, latest))
            for device, given in self._under_way.items()
        }

    def _leave(self, device: str, now: float) -> None:  # noqa: ARG002
        self._waiting.remove(device)

    def _expel(self, device: str) -> str | None:
        self._waiting.remove(device)
        given = self._under_way.get(device)
        return given.assignment if given and self.open_round else None

    def _settled(self, device: str, assignment: str, now: float) -> Answer | None:
        round_, given = self.open_round, self._under_way.get(device)
        if round_ and assignment in round_.kept:
            return Answer(device, assignment, ReceiptStatus.DUPLICATE, "it is kept already")
        if round_ and assignment in round_.refused:
            reason = round_.refused[assignment]
            return Answer(device, assignment, ReceiptStatus.REJECTED, reason)
        late = OVER
        if round_ and given and given.assignment == assignment:
            staleness = round_.number - given.number
            most = self._settings.rounds.staleness_max
            if staleness <= most and now < given.deadline_at:
                return None
            del self._under_way[device]
            if staleness > most:
                late = f"its base version is {staleness} versions old, {most} at most count"
        return Answer(device, assignment, ReceiptStatus.LATE, late)

    def _proceed(self, now: float) -> list[Action]:
        match self.phase:
            case Phase.GATHERING:
                return [self._open(), *self._give(now)]
            case Phase.OPEN if len(self._opened().kept) >= self._settings.rounds.goal:
                return self._close_now()
            case Phase.OPEN:
                return self._give(now)
            case _:
                return []

    def _open(self) -> OpenRound:
        round_ = self._begin_round()
        self._given = 0
        self._refused_devices = set()
        return OpenRound(round_.number, round_.attempt, None, ())

    def _give(self, now: float) -> list[Action]:
        ended = itertools.takewhile(lambda one: one[1].deadline_at <= now, self._under_way.items())
        for device, _ in list(ended):
            del self._under_way[device]
        if self._wish is not Wish.RUN:
            return []
        rounds = self._settings.rounds
        # Where no more may be under way, those that are may be asked anew.
        is_full = len(self._under_way) >= rounds.cohort
        self._empty_handed = {
            device
            for device in self._empty_handed
            if device in self._waiting and device in self._under_way
        }
        candidates = self._empty_handed if is_full else self._waiting
        able = [device for device in candidates if device not in self._refused_devices]
        actions: list[Action] = []
        for device in in_order_of_choice(able, rounds.selection, self._last_asked, self._rng):
            others = len(self._under_way) - (device in self._under_way)
            if others < rounds.cohort:
                actions += self._ask(device, now)
        return actions

    def _ask(self, device: str, now: float) -> list[Action]:
        round_ = self._opened()
        self._waiting.remove(device)
        self._last_asked[device] = round_.number
        assignment = self._assignment_id(device, self._given)
        self._given += 1
        deadline_at = now + self._settings.rounds.deadline_s
        self._under_way.pop(device, None)  # whose place would be among the earlier ones
        self._under_way[device] = Given(assignment, round_.number, deadline_at)
        added = AddAssignment(round_.number, round_.attempt, device, assignment, deadline_at)
        return [added, self._assign(device)]

    def _assign(self, device: str) -> Assign:
        given = self._under_way[device]
        return Assign(device, given.assignment, given.number, given.deadline_at)

    def _answered(self, device: str, assignment: str) -> None:
        given = self._under_way.get(device)
        if given and given.assignment == assignment:
            del self._under_way[device]
        if assignment in self._opened().refused:
            self._refused_devices.add(device)

    def _went_back(self, now: float) -> list[Action]:
        self._under_way.clear()  # their base versions are of another history
        return super()._went_back(now)

    def _why_wait(self) -> str:
        return f"{len(self._under_way)} devices are at work, as many as may be"
