"""Both machines under any sequence of events: what they may and may not ask for."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import pytest

from coordinator.asynchronous import AsynchronousMachine
from coordinator.control import Wish
from coordinator.events import (
    Action,
    AddAssignment,
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
from coordinator.machine import Machine, Phase
from coordinator.rounds import RoundMachine
from coordinator.store.base import Awaited, Snapshot
from coordinator.waiting import Waiting
from protocol.federation import Mode
from protocol.messages import ReceiptStatus
from protocol.tensors import NamedTensors
from tests.simulation.world import settings

DEVICES = [f"device-{i}" for i in range(7)]
BASE = NamedTensors.from_arrays({"x.A": np.zeros((1, 2), np.float32)})
HOLD_S = 20.0
DEADLINE_S = 300.0


@dataclass
class Driver:
    """Carries a machine's actions out, in thought, and checks each."""

    machine: Machine
    goal: int
    now: float = 0.0
    written: dict[str, str] = field(default_factory=dict)  # assignment -> device, ever
    held: dict[str, float] = field(default_factory=dict)  # device -> since when
    has: dict[str, str] = field(default_factory=dict)  # device -> assignment
    kept: list[str] = field(default_factory=list)
    attempts: dict[int, int] = field(default_factory=dict)
    in_round: int = 0

    def tell(self, event: Event) -> None:
        events = deque([event])
        while events:
            for action in self.machine.handle(events.popleft(), self.now):
                following = self._carry_out(action)
                if following:
                    events.append(following)
        self._check(event)

    def set_back(self, by_s: float) -> None:
        """The clock is; who is held has come no later than it says now."""
        self.now -= by_s
        self.held = {device: min(since, self.now) for device, since in self.held.items()}

    def _carry_out(self, action: Action) -> Event | None:
        match action:
            case OpenRound(number, attempt, _, cohort):
                assert attempt == self.attempts.get(number, 0) + 1
                self.attempts[number] = attempt
                self.in_round = 0
                for device, assignment in cohort:
                    self._write(device, assignment)
            case AddAssignment(_, _, device, assignment, _):
                self._write(device, assignment)
            case Assign(device, assignment, _, deadline_at):
                assert self.written[assignment] == device
                assert self.now < deadline_at <= self.now + DEADLINE_S
                self.held.pop(device, None)
                self.has[device] = assignment
            case Retry(device, after_s, spread_s, _):
                assert after_s >= 0
                assert spread_s >= 0
                del self.held[device]
            case Finish(device):
                self.held.pop(device, None)
            case Keep(device, assignment):
                assert self.written[assignment] == device
                assert assignment not in self.kept
                self.kept.append(assignment)
                self.in_round += 1
                assert self.in_round <= self.goal
                return Kept(((device, assignment),))
            case CloseRound(_, _, aggregate, _):
                return Closed(aggregate)
            case GoBack(number):
                later = {n: count for n, count in self.attempts.items() if n > number}
                return WentBack(number, later)
            case TakeUpdate() | Answer():
                self._note_answer(action)
        return None

    def _write(self, device: str, assignment: str) -> None:
        assert assignment not in self.written
        self.written[assignment] = device

    def _note_answer(self, action: TakeUpdate | Answer) -> None:
        if isinstance(action, Answer) and action.status in (
            ReceiptStatus.ACCEPTED,
            ReceiptStatus.DUPLICATE,
        ):
            assert action.assignment in self.kept

    def _check(self, event: Event) -> None:
        wanted_at = self.machine.next_tick_at()
        assert wanted_at is None or wanted_at <= self.now + DEADLINE_S
        if isinstance(event, Ticked):
            assert wanted_at is None or wanted_at > self.now, "it would tick for ever"
            assert all(self.now < since + HOLD_S for since in self.held.values())
        if self.machine.phase is Phase.FINISHED:
            assert not self.held


def _random_event(driver: Driver, rng: random.Random) -> Event:
    device = rng.choice(DEVICES)
    assignment = driver.has.get(device) or rng.choice([*driver.written, "of nobody"])
    kinds = ["check in", "upload", "leave", "offer", "tick", "refuse", "wish", "go back"]
    match rng.choices(kinds, [40, 40, 6, 4, 4, 2, 2, 2])[0]:
        case "check in":
            if driver.machine.phase is not Phase.FINISHED:
                driver.held[device] = driver.now
            return CheckedIn(device)
        case "upload":
            return Uploaded(device, assignment)
        case "leave":
            driver.held.pop(device, None)
            return Left(device)
        case "offer":
            return Offered(device, assignment)
        case "refuse":
            return Refused(device, assignment, "bad")
        case "wish":
            return Wished(rng.choice([Wish.RUN, Wish.RUN, Wish.PAUSE, Wish.STOP]))
        case "go back" if driver.machine.rounds_done:
            return AskedBack(rng.randrange(driver.machine.rounds_done))
        case _:
            return Ticked()


def _driver(mode: Mode, rng: random.Random) -> Driver:
    goal = rng.randint(1, 3)
    rounds: dict[str, Any] = {
        "count": 6,
        "cohort": 4,
        "report_goal": goal,
        "deadline_s": DEADLINE_S,
    }
    rules = settings(mode=mode, staleness_max=rng.randint(0, 3), **rounds)
    kind = AsynchronousMachine if mode is Mode.ASYNCHRONOUS else RoundMachine
    snapshot = Snapshot(rules, 0, {}, BASE, None, frozenset(), {})
    return Driver(kind(snapshot, rng, hold_s=HOLD_S), goal)


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_no_sequence_of_events_breaks_what_holds(mode: Mode) -> None:
    rounds_done = 0
    for seed in range(400):
        rng = random.Random(seed)
        print(f"seed {seed}")
        driver = _driver(mode, rng)
        driver.tell(Ticked())
        for _ in range(150):
            until = driver.now + rng.choice([0.0, 1.0, 10.0, 100.0])
            while (at := driver.machine.next_tick_at()) is not None and at <= until:
                driver.now = max(driver.now, at)
                driver.tell(Ticked())
            driver.now = until
            if rng.random() < 0.05:
                driver.set_back(rng.choice([0.5, 50.0, 1e5]))
            driver.tell(_random_event(driver, rng))
        rounds_done += driver.machine.rounds_done
    assert rounds_done > 400


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_what_comes_while_nobody_can_be_asked_draws_no_chance(mode: Mode) -> None:
    """Thousands wait while a round is open; to draw lots among them at each message is dear."""
    rules = settings(mode=mode, cohort=2, report_goal=2, deadline_s=DEADLINE_S)
    kind = AsynchronousMachine if mode is Mode.ASYNCHRONOUS else RoundMachine
    rng = random.Random(0)
    driver = Driver(
        kind(Snapshot(rules, 0, {}, BASE, None, frozenset(), {}), rng, hold_s=HOLD_S), 2
    )
    driver.tell(Ticked())
    for device in DEVICES:
        driver.tell(CheckedIn(device))
    assert len(driver.has) == 2
    before = rng.getstate()
    for device in DEVICES:
        driver.tell(Offered(device, driver.has.get(device, "of nobody")))
        driver.tell(CheckedIn(device))
    driver.tell(Left(DEVICES[0]))
    assert rng.getstate() == before


def test_who_asks_again_is_held_from_then_on() -> None:
    waiting = Waiting(HOLD_S)
    for device, now in (("a", 0.0), ("b", 1.0), ("a", 5.0)):
        waiting.add(device, now)
    assert waiting.next_release_at() == 1.0 + HOLD_S
    assert [retry.device for retry in waiting.release(5.0 + HOLD_S - 0.5, "")] == ["b"]
    waiting.add("c", 6.0)
    waiting.bring_near(2.0)  # the clock is set back
    assert waiting.next_release_at() == 2.0 + HOLD_S
    assert {retry.device for retry in waiting.release(2.0 + HOLD_S, "")} == {"a", "c"}
    assert waiting.next_release_at() is None


def test_the_longest_gone_is_replaced_first_and_who_leaves_again_is_gone_from_then_on() -> None:
    rules = settings(cohort=2, report_goal=2, deadline_s=DEADLINE_S)
    snapshot = Snapshot(rules, 0, {}, BASE, None, frozenset(), {})
    machine = RoundMachine(snapshot, random.Random(0), hold_s=1e6)
    machine.handle(Ticked(), 0.0)
    for device in ("a", "b"):
        machine.handle(CheckedIn(device), 0.0)
    for device, now in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        machine.handle(Left(device), now)
    for device in ("c", "d"):
        machine.handle(CheckedIn(device), 3.0)
    first = machine.next_tick_at()
    assert first is not None
    assert len(_assigned(machine.handle(Ticked(), first))) == 1
    second = machine.next_tick_at()
    assert second == first + 1.0
    assert len(_assigned(machine.handle(Ticked(), second))) == 1


def _assigned(actions: list[Action]) -> list[str]:
    return [action.device for action in actions if isinstance(action, Assign)]


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_an_event_costs_no_more_where_thousands_are_under_way_or_wait(mode: Mode) -> None:
    assert _steps_of_an_event(mode, 1000) <= _steps_of_an_event(mode, 100) + 20


def _steps_of_an_event(mode: Mode, count: int) -> int:
    """How many lines are run for the events of a few devices, among so many others.

    All are under way but for some that are away, and (where there are rounds) half that are done.
    """
    rules = settings(mode=mode, cohort=count, report_goal=count, deadline_s=DEADLINE_S)
    snapshot = Snapshot(rules, 0, {}, BASE, None, frozenset(), {})
    kind = AsynchronousMachine if mode is Mode.ASYNCHRONOUS else RoundMachine
    driver = Driver(kind(snapshot, random.Random(0), hold_s=HOLD_S), count)
    driver.tell(Ticked())
    devices = [f"device-{number}" for number in range(count)]
    for device in devices:
        driver.tell(CheckedIn(device))
    assert len(driver.has) == count
    if mode is Mode.SYNCHRONOUS:
        for device in devices[: count // 2]:
            driver.tell(Uploaded(device, driver.has[device]))
            driver.tell(CheckedIn(device))
    events: list[Event] = [
        *(Left(device) for device in devices[-9:]),
        CheckedIn("one more"),
        *(CheckedIn(device) for device in devices[-9:-6]),
        Uploaded(devices[-9], driver.has[devices[-9]]),
        CheckedIn(devices[-9]),
    ]

    def tell_all() -> None:
        for event in events:
            driver.machine.handle(event, driver.now)
            driver.machine.next_tick_at()

    return _lines_run(tell_all)


def _lines_run(call: Callable[[], object]) -> int:
    """A measure of work that no other process has a part in."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_the_assignment_that_ends_first_is_the_first_to_end_also_after_a_restart() -> None:
    rules = settings(mode=Mode.ASYNCHRONOUS, cohort=2, report_goal=2, deadline_s=DEADLINE_S)
    # As the store gives them: by device.
    awaited = tuple(
        Awaited(device, f"of {device}", 1, deadline_at, BASE.digest())
        for device, deadline_at in (("a", 20.0), ("b", 10.0))
    )
    snapshot = Snapshot(rules, 0, {}, BASE, None, frozenset(), {}, awaited=awaited)
    machine = AsynchronousMachine(snapshot, random.Random(0), hold_s=1e6)
    machine.handle(Ticked(), 0.0)
    for device in ("c", "d", "e"):
        assert _assigned(machine.handle(CheckedIn(device), 0.0)) == []
    assert machine.next_tick_at() == 10.0
    (third,) = _assigned(machine.handle(Ticked(), 10.0))
    assert machine.next_tick_at() == 20.0
    (fourth,) = _assigned(machine.handle(Ticked(), 20.0))
    assert machine.next_tick_at() == 10.0 + DEADLINE_S
    machine.handle(Ticked(), 5.0)  # the clock is set back
    assert machine.next_tick_at() == 5.0 + DEADLINE_S
    (_,) = _assigned(machine.handle(Ticked(), 5.0 + DEADLINE_S))
    assert {third, fourth} < {"c", "d", "e"}


def test_who_comes_back_without_its_report_is_asked_anew_though_no_place_is_free() -> None:
    rules = settings(mode=Mode.ASYNCHRONOUS, cohort=1, report_goal=1, deadline_s=DEADLINE_S)
    awaited = (Awaited("a", "of a", 0, 10.0, BASE.digest()),)
    snapshot = Snapshot(rules, 0, {}, BASE, None, frozenset(), {}, awaited=awaited)
    machine = AsynchronousMachine(snapshot, random.Random(0), hold_s=1e6)
    machine.handle(Wished(Wish.PAUSE), 0.0)
    for device in ("a", "b"):
        assert _assigned(machine.handle(CheckedIn(device), 0.0)) == []
    assert _assigned(machine.handle(Wished(Wish.RUN), 1.0)) == ["a"]
    assert machine.next_tick_at() == 1.0 + DEADLINE_S
