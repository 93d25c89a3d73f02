"""Where two concerns meet in one service: deadlines and shared writes, expulsion and parts, two
connections of one device, wishes and damage."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

import numpy as np
import pytest

from coordinator.config import ServerSettings
from coordinator.control import Control, Wish
from coordinator.errors import StoreError
from coordinator.happenings import Disconnected, Happening
from coordinator.roster import Roster
from coordinator.service import FederationService
from coordinator.session import DeviceSession
from coordinator.store.base import PartialUpdate
from coordinator.store.devices import DeviceRecord, DeviceStatus
from coordinator.store.memory import MemoryStore
from edge_client.identity import Identity
from protocol.federation import FederationSettings, Mode
from protocol.link import LinkClosedError
from protocol.messages import (
    Assignment,
    CheckIn,
    Joined,
    Receipt,
    ReceiptStatus,
    Refusal,
    Report,
    Resume,
    RetryWindow,
)
from protocol.signing import UNSIGNED
from protocol.tensors import NamedTensors
from protocol.virtual_time import at_once, simulate
from tests.simulation.raw_device import RawDevice
from tests.simulation.world import FINGERPRINT, START, FakeDevice, World, settings

Result = TypeVar("Result")
UPDATE = NamedTensors.from_flat(START.specs, np.full_like(START.flat(), 0.01))


class Desk:
    """A service whose writing takes `writing_s` of virtual time."""

    def __init__(self, rules: FederationSettings) -> None:
        self.store = MemoryStore()
        self.writing_s = 0.0
        self.service = FederationService(
            rules,
            START,
            self.store,
            rng=random.Random(1),
            run_blocking=self._run_blocking,
            read_aside=lambda read: self._run_blocking(partial(read, self.store)),
            clock=asyncio.get_running_loop().time,
        )

    async def _run_blocking(self, call: Callable[[], Result]) -> Result:
        if self.writing_s:
            await asyncio.sleep(self.writing_s)
        return call()

    async def assigned(self, *devices: str) -> dict[str, Assignment]:
        asked = [self.service.check_in(device, 0) for device in devices]
        answers = await asyncio.gather(*asked)
        return dict(zip(devices, cast(list[Assignment], answers), strict=True))


def _report(asked: Assignment) -> Report:
    told = (asked.assignment, asked.round, asked.base_version, 10, (), UPDATE.payload(), UNSIGNED)
    return Report(*told)


def test_a_device_is_held_as_long_as_the_configuration_has_it_where_nobody_says_otherwise() -> None:
    async def scenario() -> None:
        desk = Desk(settings(count=1, cohort=2))
        await desk.service.open()
        answer = await desk.service.check_in("alone", 0)
        assert isinstance(answer, RetryWindow)
        held_s = asyncio.get_running_loop().time()
        assert held_s == pytest.approx(ServerSettings().hold_s, abs=0.1)

    simulate(scenario)


def test_a_deadline_that_comes_while_reports_are_written_leaves_none_of_them_out() -> None:
    rules = settings(count=1, cohort=4, minimum_reports=3, deadline_s=100.0)

    async def scenario() -> None:
        desk = Desk(rules)
        await desk.service.open()
        asked = await desk.assigned("a", "b", "c", "d")
        await asyncio.sleep(99.0)
        desk.writing_s = 0.9  # the first alone, the others together, and past the deadline
        receipts = await asyncio.gather(
            *(desk.service.take(name, _report(asked[name]), UPDATE) for name in "abc")
        )
        assert {cast(Receipt, one).status for one in receipts} == {ReceiptStatus.ACCEPTED}
        await asyncio.sleep(10.0)
        (outcome,) = desk.store.history("sim")
        assert (outcome.outcome.value, outcome.reports) == ("aggregated", 3)

    simulate(scenario)


def test_a_question_waits_for_one_write_though_reports_come_all_the_while() -> None:
    """Whom they let wait holds memory for its update, and does not send it."""
    names = [f"device-{number}" for number in range(32)]

    async def scenario() -> list[float]:
        desk = Desk(settings(count=1, cohort=len(names), deadline_s=1000.0))
        await desk.service.open()
        asked = await desk.assigned(*names)
        desk.writing_s = 1.0
        loop = asyncio.get_running_loop()
        waits: list[float] = []

        async def take_part(number: int, name: str) -> None:
            await asyncio.sleep(0.4 * number)
            began_at = loop.time()
            assert isinstance(await desk.service.offer(name, _report(asked[name])), Resume)
            waits.append(loop.time() - began_at)
            began_at = loop.time()
            await desk.service.take(name, _report(asked[name]), UPDATE)
            waits.append(loop.time() - began_at)

        await asyncio.gather(*(take_part(*one) for one in enumerate(names)))
        return waits

    # Who comes while one lot is written is in the next one, unless that ends the round.
    assert max(simulate(scenario)[:-6]) <= 2.0


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_the_parts_of_an_expelled_device_go_with_it(mode: Mode) -> None:
    rules = settings(mode=mode, count=2, cohort=2, report_goal=1, deadline_s=1000.0)

    async def scenario() -> None:
        desk = Desk(rules)
        await desk.service.open()
        asked = await desk.assigned("a", "b")
        assignment = asked["a"].assignment
        part = PartialUpdate(assignment, UPDATE.payload().digest, 0, b"half of it")
        await desk.service.uploads.keep(part)
        assert desk.store.partial_updates("sim") == [assignment]
        await desk.service.expelled("a", "it is revoked")
        assert desk.store.partial_updates("sim") == []

    simulate(scenario)


def test_an_answer_to_an_older_connection_is_not_given_to_a_newer_ones_other_question() -> None:
    rules = settings(count=2, cohort=2, deadline_s=1000.0)

    async def scenario() -> None:
        desk = Desk(rules)
        await desk.service.open()
        asked = await desk.assigned("a", "b")
        desk.writing_s = 1.0
        older = asyncio.create_task(desk.service.take("a", _report(asked["a"]), UPDATE))
        await asyncio.sleep(0.5)
        newer = asyncio.create_task(desk.service.check_in("a", 0))
        with pytest.raises(LinkClosedError):
            await older
        assert isinstance(await newer, RetryWindow)

    simulate(scenario)


def test_a_store_that_cannot_tell_the_operators_wishes_ends_the_service() -> None:
    class Silent(MemoryStore):
        is_silent = False

        def control(self, federation: str) -> Control:
            if self.is_silent:
                raise StoreError("database is locked")
            return MemoryStore.control(self, federation)

    async def scenario() -> None:
        store = Silent()
        service = FederationService(
            settings(),
            START,
            store,
            rng=random.Random(1),
            run_blocking=at_once,
            read_aside=lambda read: at_once(partial(read, store)),
            control_every_s=1,
        )
        await service.open()
        store.is_silent = True
        await asyncio.sleep(3.0)
        assert isinstance(service.failure.exception(), StoreError)

    simulate(scenario)


def test_devices_are_told_that_the_store_has_failed_and_operators_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Full(MemoryStore):
        def keep_reports(self, *_: object) -> list[bool]:
            raise StoreError("the store sqlite:////secret/place: no room")

    async def scenario() -> None:
        world = World(settings(count=1, cohort=1), store=Full())
        await world.start()
        running = asyncio.create_task(world.take_part(FakeDevice("one", training_s=1.0)))
        await asyncio.sleep(10.0)
        running.cancel()
        assert world.service is not None
        assert isinstance(world.service.failure.exception(), StoreError)

    simulate(scenario)
    told = [one.getMessage() for one in caplog.records if one.name == "pf2lora.client"]
    assert any("the coordinator said: the coordinator's store has failed" in one for one in told)
    assert not any("secret" in one for one in told)
    assert "the store sqlite:////secret/place: no room" in caplog.text


def test_a_wish_to_go_back_to_a_damaged_base_version_is_let_go_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether it is found at the start or later: nothing of the round under way is lost."""

    class Damaged(MemoryStore):
        def base_after(self, federation: str, number: int) -> NamedTensors | None:
            raise StoreError(f"the base version after round {number}: damaged")

    async def scenario() -> list[int]:
        world = World(settings(count=6, cohort=1), store=Damaged())
        await world.start()
        device = FakeDevice("one", training_s=10.0)
        running = asyncio.create_task(world.take_part(device))
        for restarts in (False, True):
            await asyncio.sleep(15.0)
            await world.wish(Control(Wish.RUN, roll_back_to=0), killed=restarts)
            assert world.store.control("sim") == Control()
        await running
        return device.trained

    trained = simulate(scenario)
    assert trained == sorted(set(trained)), "no round was run again"
    assert (
        caplog.text.count("cannot roll back to round 0: the base version after round 0: dam") == 2
    )


def test_a_pause_that_comes_as_a_wish_to_go_back_is_let_go_of_is_obeyed() -> None:
    class PausedMeanwhile(MemoryStore):
        def base_after(self, federation: str, number: int) -> NamedTensors | None:
            self.set_wish(federation, Wish.PAUSE)  # the operator, in another process
            return super().base_after(federation, number)

    async def scenario() -> None:
        world = World(settings(count=6, cohort=1), store=PausedMeanwhile())
        await world.start()
        await world.wish(Control(roll_back_to=3))
        assert world.store.control("sim") == Control(Wish.PAUSE)

    simulate(scenario)


class WatchedWorld(World):
    """A world that remembers which connections ended, and whose."""

    def __init__(self, rules: FederationSettings) -> None:
        super().__init__(rules)
        self.ended: list[Disconnected] = []

    def _observe(self, happening: Happening) -> None:
        super()._observe(happening)
        if isinstance(happening, Disconnected):
            self.ended.append(happening)


def test_a_connection_that_comes_too_soon_is_not_taken_for_the_devices_leaving() -> None:
    async def scenario() -> None:
        world = WatchedWorld(settings(count=1, cohort=2))
        await world.start()
        world.server.roster = Roster(joins_s=0.01)  # one at once
        answers = []
        for _ in range(2):
            device = RawDevice(await world.dial(), Identity.named("a"))
            answers.append(await device.join())
        assert isinstance(answers[0], Joined)
        assert isinstance(answers[1], Refusal)
        await asyncio.sleep(1.0)
        assert [one.federation for one in world.ended] == [""]

    simulate(scenario)


def test_an_expulsion_is_not_counted_as_one_more_bad_report() -> None:
    rules = settings(count=2, cohort=2, deadline_s=1000.0)

    async def scenario() -> None:
        desk = Desk(rules)
        await desk.service.open()
        asked = await desk.assigned("a", "b")
        desk.store.devices.add(DeviceRecord("a", bytes(32), DeviceStatus.REVOKED, 0.0, 0, "lost"))
        await desk.service.expelled("a", "it is revoked")
        receipt = await desk.service.offer("a", _report(asked["a"]))
        assert not isinstance(receipt, Resume)
        assert receipt.status is ReceiptStatus.REJECTED
        found = desk.store.devices.find("a")
        assert found is not None
        assert (found.status, found.rejected, found.reason) == (DeviceStatus.REVOKED, 0, "lost")

    simulate(scenario)


class SeenRoster(Roster):
    """A roster that tells whom it has."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[DeviceSession] = []

    def add(self, session: DeviceSession) -> None:
        self.seen.append(session)
        super().add(session)


def test_a_goodbye_and_an_answer_that_meet_end_the_session_in_good_order() -> None:
    """Whichever of the two is first: a device that waits is told to go as its round opens."""

    async def scenario(steps: int) -> str:
        world = World(settings(count=1, cohort=2))
        await world.start()
        world.server.roster = roster = SeenRoster()
        devices = [RawDevice(await world.dial(), Identity.named(name)) for name in "ab"]
        for device in devices:
            await device.join()
            await device.send(CheckIn(FINGERPRINT, 10))
        for _ in range(steps):
            await asyncio.sleep(0)
        roster.seen[0].stop()
        answer = type(await devices[0].receive()).__name__
        await asyncio.sleep(1.0)  # a session that fails is told of at the end
        return answer

    answers = {simulate(partial(scenario, steps)) for steps in range(40)}
    assert answers == {"Assignment", "Goodbye"}
