"""Synchronous rounds: a cohort is asked at once, and the round is over when enough have reported.

A round opens when devices enough wait, and is due when its goal is reached, everyone has answered
or its deadline has come. A device of the cohort that has vanished is replaced by one that waits.
"""

from __future__ import annotations

import itertools
import random
from typing import Final

from coordinator.control import Wish
from coordinator.events import Action, AddAssignment, Answer, Assign, OpenRound, Retry
from coordinator.machine import Machine, Phase
from coordinator.store.base import Snapshot
from coordinator.waiting import in_order_of_choice
from protocol.messages import ReceiptStatus

# How long a device that is away for a moment (told to come back, or cut off) still counts as there.
AWAY_GRACE_S: Final = 120.0
# With devices enough for the goal, how long a round waits for the rest of its cohort.
GATHER_S: Final = 5.0
# A device of the cohort that stays away for this share of the deadline, and AWAY_GRACE_S at most,
# has vanished; it is replaced while this share of the deadline is left.
VANISHED_SHARE: Final = 0.1
REPLACED_SHARE: Final = 0.5


class RoundMachine(Machine):
    """All synchronous rounds of one federation."""

    def __init__(self, snapshot: Snapshot, rng: random.Random, *, hold_s: float) -> None:
        super().__init__(snapshot, rng, hold_s=hold_s)
        # Device that is expected back, and so does not wait -> until when.
        self._away: dict[str, float] = {}
        self._goal_since: float | None = None  # since when there are enough for the goal
        record = snapshot.open_round
        self._deadline_at = (record.deadline_at if record else None) or 0.0
        self._cohort = {m.device: m.assignment for m in record.cohort} if record else {}
        # Of the cohort: who has left, since when, the longest gone first; and who has been
        # replaced. After a restart those not here may be training, and are not counted as gone.
        self._missing: dict[str, float] = {}
        self._replaced: set[str] = set()
        # Who waits and is not of the cohort, and so can take the place of one that has vanished.
        self._spare: set[str] = set()

    def next_tick_at(self) -> float | None:
        times = [self._waiting.next_release_at()]
        if self.phase is Phase.OPEN:
            times.append(self._deadline_at)
            first = next(iter(self._missing), None)
            if first is not None and self._wish is Wish.RUN and self._spare:
                times.append(self._vanished_at(first))
        if self.phase is Phase.GATHERING and self._goal_since is not None:
            times.append(self._goal_since + GATHER_S)
        return min((time for time in times if time is not None), default=None)

    def given_in(self, device: str, assignment: str) -> int | None:
        ours = self.open_round and self._cohort.get(device) == assignment
        return self._opened().number if ours else None

    def awaited(self) -> set[str]:
        if self.phase is not Phase.OPEN:
            return set()
        round_ = self._opened()
        return {one for one in self._cohort.values() if not round_.answered(one)}

    def expected(self) -> set[str]:
        return {*self._away, *filter(self._is_awaited, self._cohort)}

    def _check_in(self, device: str, now: float) -> list[Action]:
        self._missing.pop(device, None)
        if self._is_awaited(device):
            return [self._assign(device)]
        self._waiting.add(device, now)
        if device not in self._cohort:
            self._spare.add(device)
        self._away.pop(device, None)
        return self._proceed(now)

    def _bring_near(self, now: float) -> None:
        self._waiting.bring_near(now)
        self._deadline_at = min(self._deadline_at, now + self._settings.rounds.deadline_s)
        latest = now + AWAY_GRACE_S
        self._away = {device: min(until, latest) for device, until in self._away.items()}
        self._missing = {device: min(since, now) for device, since in self._missing.items()}
        if self._goal_since is not None:
            self._goal_since = min(self._goal_since, now)

    def _leave(self, device: str, now: float) -> None:
        if self._waiting.remove(device):
            self._spare.discard(device)
            self._away[device] = now + AWAY_GRACE_S
        elif self._is_awaited(device) and device not in self._replaced:
            self._missing.pop(device, None)
            self._missing[device] = now

    def _expel(self, device: str) -> str | None:
        self._waiting.remove(device)
        self._spare.discard(device)
        self._away.pop(device, None)
        return self._cohort[device] if self._is_awaited(device) else None

    def _answered(self, device: str, assignment: str) -> None:  # noqa: ARG002
        self._missing.pop(device, None)

    def _is_awaited(self, device: str) -> bool:
        assignment = self._cohort.get(device)
        if self.phase is not Phase.OPEN or assignment is None:
            return False
        return not self._opened().answered(assignment)

    def _settled(self, device: str, assignment: str, now: float) -> Answer | None:  # noqa: ARG002
        self._missing.pop(device, None)
        if self.given_in(device, assignment) is None:
            return Answer(device, assignment, ReceiptStatus.LATE, "its round is over")
        round_ = self._opened()
        if assignment in round_.kept:
            return Answer(device, assignment, ReceiptStatus.DUPLICATE, "it is kept already")
        if assignment in round_.refused:
            reason = round_.refused[assignment]
            return Answer(device, assignment, ReceiptStatus.REJECTED, reason)
        if self.phase is not Phase.OPEN:
            return Answer(device, assignment, ReceiptStatus.LATE, "its round is being closed")
        return None

    def _proceed(self, now: float) -> list[Action]:
        match self.phase:
            case Phase.GATHERING:
                return self._open_if_enough(now)
            case Phase.OPEN if self._is_due(now):
                return self._close_now()
            case Phase.OPEN:
                return self._replace(now)
            case _:
                return []

    # --- opening ------------------------------------------------------------------------------

    def _open_if_enough(self, now: float) -> list[Action]:
        rounds = self._settings.rounds
        most = len(self._waiting) + len(self._away)  # told without looking at each
        here = self._here(now) if self._wish is Wish.RUN and most >= rounds.goal else 0
        if here < rounds.goal:
            self._goal_since = None
            return []
        if self._goal_since is None:
            self._goal_since = now
        if here < rounds.cohort and now < self._goal_since + GATHER_S:
            return []
        self._goal_since = None
        available = [*self._waiting, *self._away]
        order = in_order_of_choice(available, rounds.selection, self._last_asked, self._rng)
        return self._open(sorted(order[: rounds.cohort]), now)

    def _here(self, now: float) -> int:
        """How many devices wait or are expected back."""
        self._away = {device: until for device, until in self._away.items() if now < until}
        return len(self._waiting) + len(self._away)

    def _open(self, chosen: list[str], now: float) -> list[Action]:
        round_ = self._begin_round()
        self._last_asked |= dict.fromkeys(chosen, round_.number)
        self._cohort = {device: self._assignment_id(device) for device in chosen}
        self._deadline_at = now + self._settings.rounds.deadline_s
        cohort = tuple(self._cohort.items())
        # Who is away for a moment gets the assignment when it is back.
        present = [device for device in chosen if self._waiting.remove(device)]
        self._missing = dict.fromkeys(set(chosen) - set(present), now)
        self._replaced = set()
        self._spare = set(self._waiting)
        return [
            OpenRound(round_.number, round_.attempt, self._deadline_at, cohort),
            *map(self._assign, present),
        ]

    def _assign(self, device: str) -> Assign:
        number = self._opened().number
        return Assign(device, self._cohort[device], number, self._deadline_at)

    # --- under way ----------------------------------------------------------------------------

    def _is_due(self, now: float) -> bool:
        round_ = self._opened()
        if len(round_.kept) >= self._settings.rounds.goal or now >= self._deadline_at:
            return True
        # Each is looked at only where there are answers enough for all.
        answers = len(round_.kept) + len(round_.refused)
        return answers >= len(self._cohort) and not self.awaited()

    def _replace(self, now: float) -> list[Action]:
        rounds = self._settings.rounds
        if now > self._deadline_at - REPLACED_SHARE * rounds.deadline_s:
            self._missing.clear()  # too late for anyone
        if self._wish is not Wish.RUN or not self._spare:
            return []
        gone = itertools.takewhile(lambda device: self._vanished_at(device) <= now, self._missing)
        if not (vanished := sorted(gone)):
            return []
        order = in_order_of_choice(self._spare, rounds.selection, self._last_asked, self._rng)
        actions: list[Action] = []
        for device, substitute in zip(vanished, order, strict=False):
            del self._missing[device]
            self._replaced.add(device)
            actions += self._ask_also(substitute)
        return actions

    def _ask_also(self, device: str) -> list[Action]:
        round_ = self._opened()
        self._waiting.remove(device)
        self._spare.discard(device)
        self._last_asked[device] = round_.number
        assignment = self._cohort[device] = self._assignment_id(device)
        added = AddAssignment(round_.number, round_.attempt, device, assignment, None)
        return [added, self._assign(device)]

    def _vanished_at(self, device: str) -> float:
        grace_s = min(AWAY_GRACE_S, VANISHED_SHARE * self._settings.rounds.deadline_s)
        return self._missing[device] + grace_s

    # --- those that wait ----------------------------------------------------------------------

    def _release_held(self, now: float) -> list[Retry]:
        released = super()._release_held(now)
        for retry in released:
            self._spare.discard(retry.device)
            self._away[retry.device] = now + retry.after_s + retry.spread_s + AWAY_GRACE_S
        return released

    def _why_wait(self) -> str:
        if self.phase is Phase.GATHERING:
            cohort = self._settings.rounds.cohort
            return f"waiting for devices: {self._here(self._now)} of {cohort} are here"
        return f"round {self.rounds_done + 1} is under way"
