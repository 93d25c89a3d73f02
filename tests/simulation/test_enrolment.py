"""Pending keys, approval, revocation and quarantine, on a virtual clock."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest

from coordinator import errors as coordinator_errors
from coordinator.enrolment import PENDING_KEPT_S, PENDING_MAX, Admitted, Gate
from coordinator.errors import StoreError
from coordinator.screening import Bounds
from coordinator.store.devices import DeviceRecord, DeviceStatus
from coordinator.store.memory import MemoryStore
from edge_client.errors import RefusedError
from edge_client.identity import Identity
from protocol.errors import ErrorCode
from protocol.federation import Mode, Selection
from protocol.link import LinkClosedError
from protocol.messages import Assignment, CheckIn, Join, Joined, Refusal
from protocol.signing import UNSIGNED, join_statement
from protocol.tensors import NamedTensors
from protocol.virtual_time import simulate
from tests.simulation.raw_device import RawDevice
from tests.simulation.world import (
    FINGERPRINT,
    FakeDevice,
    World,
    settings,
)

Result = TypeVar("Result")


def _devices(count: int) -> list[FakeDevice]:
    return [FakeDevice(f"device-{number}", training_s=1.0) for number in range(count)]


def test_a_pending_device_waits_and_takes_part_once_it_is_approved() -> None:
    device = FakeDevice("new")

    async def scenario() -> World:
        world = World(settings(count=2, cohort=1), is_open=False)
        await world.start()
        running = asyncio.create_task(world.take_part(device))
        await asyncio.sleep(600.0)
        (record,) = world.store.devices.all()
        assert record.status is DeviceStatus.PENDING
        assert (record.device, record.key) == (device.identity.device, device.identity.key)
        assert device.trained == []
        world.store.devices.set_status(record.device, DeviceStatus.APPROVED, "")
        await running
        return world

    world = simulate(scenario)
    assert device.trained == [1, 2]
    assert world.refusals[ErrorCode.PENDING] > 1


def test_keys_that_wait_are_bounded_in_number_and_time() -> None:
    async def scenario() -> list[object]:
        world = World(settings(count=1, cohort=1), is_open=False)
        await world.start()
        now = asyncio.get_running_loop().time()
        for number in range(PENDING_MAX):
            key = number.to_bytes(32, "big")
            record = DeviceRecord(f"{number:032x}", key, DeviceStatus.PENDING, now)
            world.store.devices.add(record)
        answers: list[object] = []
        for pause_s in (0.0, PENDING_KEPT_S + 1):
            await asyncio.sleep(pause_s)
            answers.append(await RawDevice(await world.dial(), Identity.named("new")).join())
            answers.append(len(world.store.devices.all()))
        return answers

    crowded, before, later, after = simulate(scenario)
    assert isinstance(crowded, Refusal)
    assert isinstance(later, Refusal)
    assert "1000 devices wait for approval already" in crowded.reason
    assert "waits for the operator's approval" in later.reason
    assert (before, after) == (PENDING_MAX, 1)


def test_fresh_keys_do_not_fill_the_store_and_who_reports_is_remembered() -> None:
    async def scenario() -> tuple[set[str], FakeDevice]:
        world = World(settings(count=2, cohort=1, selection=Selection.LEAST_RECENT))
        world.newcomers_max = 10
        await world.start()
        steady = FakeDevice("steady", training_s=10.0)
        running = asyncio.create_task(world.take_part(steady))
        waiting = FakeDevice("waiting")
        also_running = asyncio.create_task(world.take_part(waiting))
        await asyncio.sleep(1.0)
        for number in range(35):
            raw = RawDevice(await world.dial(), Identity.named(f"fresh-{number}"))
            assert isinstance(await raw.join(), Joined)
            await raw.link.close()
            assert len(world.store.devices.all()) <= 11  # with the one that was asked
        assert world.store.devices.find(waiting.id) is None
        await asyncio.gather(running, also_running)
        reported = {device.id for device in (steady, waiting) if device.receipts}
        return reported - {record.device for record in world.store.devices.all()}, waiting

    unknown, waiting = simulate(scenario)
    assert waiting.trained == [2]  # on the connection on which it was forgotten
    assert not unknown


class CountedStore(MemoryStore):
    """Counts the writes that new keys cost; the last of them may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.is_full = False
        add = self.devices.add

        def counted(*records: DeviceRecord) -> None:
            if self.is_full:
                raise StoreError("no room")
            self.writes += 1
            add(*records)

        self.devices.add = counted  # type: ignore[method-assign]


def test_those_who_come_together_share_a_write_and_are_judged_each_by_itself() -> None:
    async def join(gate: Gate, name: str) -> Admitted:
        identity = Identity.named(name)
        asked = Join("sim", identity.key, b"", "", UNSIGNED)
        signature = identity.sign(join_statement(asked, b"nonce", 1))
        return await gate.admit(replace(asked, signature=signature), b"nonce", 1, b"")

    async def slowly(call: Callable[[], Result]) -> Result:
        await asyncio.sleep(0.01)
        return call()

    async def scenario() -> None:
        store = CountedStore()
        revoked = Identity.named("device-7")
        record = DeviceRecord(revoked.device, revoked.key, DeviceStatus.REVOKED, 0.0)
        store.devices.add(record)
        gate = Gate(store.devices, is_open=True, run_blocking=slowly)
        names = [f"device-{number}" for number in range(40)]
        answers = await asyncio.gather(*(join(gate, n) for n in names), return_exceptions=True)
        assert [type(one) for one in answers].count(Admitted) == 39
        assert isinstance(answers[7], coordinator_errors.RefusedError)
        assert len(store.devices.all()) == 40
        assert store.writes <= 3
        store.is_full = True
        answers = await asyncio.gather(
            *(join(gate, f"{n}, new") for n in "abc"), return_exceptions=True
        )
        assert {type(one) for one in answers} == {StoreError}
        store.is_full = False
        assert isinstance(await join(gate, "a, new"), Admitted)

    simulate(scenario)


def test_a_revoked_device_leaves_the_round_to_the_others() -> None:
    """It holds an assignment: nobody waits for it, and it is not chosen again."""
    devices = _devices(3)
    rules = settings(count=3, cohort=4, report_goal=3, minimum_reports=3, deadline_s=1e6)

    async def scenario() -> World:
        world = World(rules)
        await world.start()
        lost = RawDevice(await world.dial(), Identity.named("lost"))
        await lost.join()
        await lost.send(CheckIn(FINGERPRINT, 10))
        everyone = asyncio.gather(*(world.take_part(device) for device in devices))
        assert isinstance(await lost.receive(), Assignment)
        world.store.devices.set_status(lost.identity.device, DeviceStatus.REVOKED, "stolen")
        await world.server.expel_barred()
        refusal = await lost.receive()
        assert isinstance(refusal, Refusal)
        assert refusal.code is ErrorCode.REVOKED
        assert refusal.reason.endswith("is revoked: stolen")
        with pytest.raises(LinkClosedError):
            await lost.link.receive()
        await everyone
        again = await RawDevice(await world.dial(), Identity.named("lost")).join()
        assert isinstance(again, Refusal)
        assert again.code is ErrorCode.REVOKED
        return world

    world = simulate(scenario)
    assert [device.trained for device in devices] == [[1, 2, 3]] * 3
    assert [o.reports for o in world.store.history("sim")] == [3, 3, 3]


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("killed", [False, True])
def test_nobody_waits_for_a_device_that_is_revoked_while_it_is_away(
    mode: Mode, killed: bool
) -> None:
    lost, other = FakeDevice("lost", training_s=1e9), FakeDevice("other", training_s=1.0)

    async def scenario() -> float:
        world = World(settings(mode=mode, count=2, cohort=1, report_goal=1, deadline_s=1e6))
        await world.start()
        first = asyncio.create_task(world.take_part(lost))
        await asyncio.sleep(5.0)
        first.cancel()
        await asyncio.sleep(5.0)
        world.store.devices.set_status(lost.id, DeviceStatus.REVOKED, "stolen")
        if killed:
            await world.kill()
            await world.start()
        await world.server.expel_barred()
        await world.take_part(other)
        await asyncio.sleep(1.0)
        assert world.service is not None
        assert world.service.everyone_told
        return asyncio.get_running_loop().time()

    assert simulate(scenario) < 30.0
    assert (lost.trained, other.trained) == ([1], [1, 2])


async def _keep_out(world: World) -> None:
    """As the server does."""
    while True:
        await asyncio.sleep(1.0)
        await world.server.expel_barred()


def _poisoned(update: NamedTensors) -> NamedTensors:
    flat = np.full_like(update.flat(), 1.1)
    return NamedTensors.from_flat(update.specs, flat)


def test_who_repeats_bad_reports_is_quarantined_until_approval(
    caplog: pytest.LogCaptureFixture,
) -> None:
    devices, bad = _devices(2), FakeDevice("bad", training_s=0.5, damage=_poisoned)
    rules = settings(count=8, cohort=3, report_goal=2, minimum_reports=2, deadline_s=1e6)

    async def scenario() -> World:
        world = World(rules)
        await world.start()
        honest = asyncio.gather(*(world.take_part(device) for device in devices))
        keeping_out = asyncio.create_task(_keep_out(world))
        with pytest.raises(RefusedError, match=r"quarantined.*root mean square of 1\.1, over 1"):
            await world.take_part(bad)
        await honest
        keeping_out.cancel()
        return world

    with caplog.at_level(logging.WARNING):
        world = simulate(scenario)
    record = world.store.devices.find(bad.identity.device)
    assert record is not None
    assert (record.status, record.rejected) == (DeviceStatus.QUARANTINED, 3)
    assert {receipt.status.value for receipt in bad.receipts} == {"rejected"}
    assert [device.trained for device in devices] == [list(range(1, 9))] * 2
    assert world.refusals[ErrorCode.QUARANTINED] == 1
    assert f"device {bad.identity.device} is quarantined after 3 rejected" in caplog.text


@pytest.mark.parametrize("claimed", [100, 1 << 20])
def test_more_examples_than_a_device_has_are_rejected(claimed: int) -> None:
    liar = FakeDevice("liar", training_s=1.0, claimed=claimed)

    async def scenario() -> None:
        world = World(
            settings(count=1, cohort=1, deadline_s=1e6), bounds=Bounds(quarantine_after=1)
        )
        await world.start()
        keeping_out = asyncio.create_task(_keep_out(world))
        with pytest.raises(RefusedError, match="quarantined"):
            await world.take_part(liar)
        keeping_out.cancel()

    simulate(scenario)
    assert liar.receipts[0].status.value == "rejected"
    assert liar.receipts[0].reason == (
        f"it claims {claimed} examples, the device had {liar.examples}"
    )


def test_a_device_of_more_examples_than_are_taken_is_refused() -> None:
    device = FakeDevice("rich")

    async def scenario() -> None:
        world = World(settings(count=1, cohort=1), bounds=Bounds(examples_max=5))
        await world.start()
        await world.take_part(device)

    with pytest.raises(RefusedError, match=r"ineligible.*takes 5 at most"):
        simulate(scenario)
