"""Whole federations under faults, on a virtual clock: the same bytes in the end."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import numpy as np
import pytest

from coordinator.control import Control, Wish
from coordinator.store.base import Outcome
from edge_client.errors import RefusedError, UnreachableError
from protocol.errors import LocalProtocolError
from protocol.fake_link import Faults
from protocol.federation import Mode, Selection, Weighting, WireDtype
from protocol.messages import ReceiptStatus
from protocol.tensors import NamedTensors
from protocol.virtual_time import simulate
from tests.simulation.laws import hold_in_every_round, made_again, run
from tests.simulation.world import START, FakeDevice, World, settings

FAULTY = Faults(drop=0.02, duplicate=0.02, cut=0.02, delay_s=2.0)


def _devices(count: int) -> list[FakeDevice]:
    return [FakeDevice(f"device-{i:02}", training_s=1.0 + i % 7) for i in range(count)]


async def _all(world: World, devices: list[FakeDevice]) -> None:
    await world.start()
    await asyncio.gather(*(world.take_part(device) for device in devices))


def _finals(devices: list[FakeDevice]) -> set[bytes]:
    return {bytes(device.final.buffer) for device in devices if device.final}


def _run(seed: int, faults: Faults, count: int = 20, rounds: int = 10) -> list[FakeDevice]:
    devices = _devices(count)
    rules = settings(count=rounds, cohort=count, minimum_reports=count, deadline_s=1e6)

    async def scenario() -> None:
        await _all(World(rules, seed, faults), devices)

    simulate(scenario)
    return devices


def test_twenty_devices_end_with_the_same_bytes_with_and_without_faults() -> None:
    calm = _finals(_run(0, Faults()))
    assert len(calm) == 1
    for seed in range(3):
        print(f"seed {seed}")
        devices = _run(seed, FAULTY)
        assert _finals(devices) == calm
        for device in devices:
            assert sorted(set(device.trained)) == list(range(1, 11))


def test_a_report_counts_once_however_often_it_is_sent() -> None:
    devices = _run(5, FAULTY, count=6, rounds=6)
    for device in devices:
        kept = [r for r in device.receipts if r.status is not ReceiptStatus.LATE]
        assert len({r.assignment for r in kept}) == 6


def test_a_coordinator_killed_again_and_again_ends_with_the_same_bytes() -> None:
    calm = _finals(_run(0, Faults(), count=5, rounds=5))
    devices = _devices(5)
    rules = settings(count=5, cohort=5, minimum_reports=5, deadline_s=1e6)

    async def scenario() -> None:
        world = World(rules, 3, Faults(delay_s=1.0))

        async def torment() -> None:
            for _ in range(12):
                await asyncio.sleep(world.rng.random() * 6)
                await world.kill()
                await asyncio.sleep(world.rng.random() * 3)
                await world.start()

        tormentor = asyncio.create_task(torment())
        await world.start()
        await asyncio.gather(*(world.take_part(device) for device in devices))
        await tormentor

    simulate(scenario)
    assert _finals(devices) == calm


def test_a_device_killed_mid_round_does_not_stop_the_round_past_its_deadline() -> None:
    devices = _devices(4)
    rules = settings(count=2, cohort=4, minimum_reports=2, deadline_s=60.0)

    async def scenario() -> float:
        world = World(rules)
        await world.start()
        tasks = [asyncio.create_task(world.take_part(device)) for device in devices]
        devices[0].training_s = 1e9
        await asyncio.sleep(30.0)
        tasks[0].cancel()
        late = FakeDevice("late-comer")
        await asyncio.gather(*tasks[1:], world.take_part(late))
        return asyncio.get_running_loop().time()

    ended_at = simulate(scenario)
    assert ended_at < 60.0 + 60.0
    assert devices[0].final is None
    assert len(_finals(devices)) == 1


def test_too_few_reports_abandon_the_round_and_the_next_attempt_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow, quick = FakeDevice("slow", training_s=100.0), FakeDevice("quick")
    rules = settings(count=1, cohort=2, minimum_reports=2, deadline_s=50.0)

    async def scenario() -> World:
        world = World(rules)
        await world.start()
        first = asyncio.create_task(world.take_part(slow))
        second = asyncio.create_task(world.take_part(quick))
        await asyncio.sleep(110.0)
        slow.training_s = 5.0
        await asyncio.gather(first, second)
        return world

    with caplog.at_level(logging.WARNING):
        world = simulate(scenario)
    assert "round 1 abandoned: 1 reports, rounds.minimum_reports is 2" in caplog.messages
    outcomes = [(o.number, o.outcome.value, o.reports) for o in world.store.history("sim")]
    assert outcomes[0] == (1, "abandoned", 1)
    assert outcomes[-1] == (1, "aggregated", 2)
    assert ReceiptStatus.LATE in {receipt.status for receipt in slow.receipts}


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_an_unusable_update_is_rejected_and_the_round_goes_on_without_it(value: float) -> None:
    def poison(update: NamedTensors) -> NamedTensors:
        flat = update.flat().copy()
        flat[3] = value
        return NamedTensors.from_flat(update.specs, flat)

    devices = [FakeDevice("bad", damage=poison), FakeDevice("good")]
    rules = settings(count=2, cohort=2, minimum_reports=1, deadline_s=1e6)

    async def scenario() -> None:
        await _all(World(rules), devices)

    simulate(scenario)
    assert {receipt.status for receipt in devices[0].receipts} == {ReceiptStatus.REJECTED}
    assert {receipt.status for receipt in devices[1].receipts} == {ReceiptStatus.ACCEPTED}
    assert len(_finals(devices)) == 1


def test_bfloat16_updates_are_averaged() -> None:
    devices = [FakeDevice(f"d{i}", dtype=WireDtype.BFLOAT16) for i in range(3)]
    rules = replace(settings(count=2, cohort=3, deadline_s=1e6), update_dtype=WireDtype.BFLOAT16)

    async def scenario() -> None:
        await _all(World(rules), devices)

    simulate(scenario)
    assert len(_finals(devices)) == 1


def test_a_device_with_another_backbone_is_refused_with_both_named() -> None:
    other = "sha256:" + "b" * 64

    async def scenario() -> None:
        world = World(settings(count=1, cohort=1))
        await world.start()
        await world.take_part(FakeDevice("other", fingerprint=other))

    with pytest.raises(RefusedError) as refusal:
        simulate(scenario)
    assert other in str(refusal.value)
    assert "sha256:" + "a" * 64 in str(refusal.value)


def test_without_a_coordinator_the_device_gives_up_and_says_so() -> None:
    async def scenario() -> None:
        world = World(settings(count=1, cohort=1))
        session = world.session(FakeDevice("alone"))
        session._first_contact_patience_s = 10.0
        await session.run()

    with pytest.raises(UnreachableError, match="nobody listens"):
        simulate(scenario)


def test_a_coordinator_that_ends_with_the_last_download_keeps_no_device_waiting() -> None:
    async def scenario() -> None:
        world = World(settings(count=1, cohort=1))
        await world.start()

        class Last(FakeDevice):
            async def finish(self, base: NamedTensors, rounds: int) -> None:
                await super().finish(base, rounds)
                await world.kill()
                await world.device_ends[-1].close()

        device = Last("d")
        async with asyncio.timeout(60.0):
            await world.take_part(device)
        assert device.final is not None

    simulate(scenario)


def test_a_device_is_not_done_until_it_has_the_final_adapter() -> None:
    """A coordinator that ends when all are (`exit_when_finished`) would leave it without one."""

    async def scenario() -> None:
        world = World(settings(count=1, cohort=1))
        await world.start()

        class Slow(FakeDevice):
            async def finish(self, base: NamedTensors, rounds: int) -> None:
                assert world.service is not None
                assert not world.service.everyone_told
                await super().finish(base, rounds)

        await world.take_part(Slow("d"))
        await asyncio.sleep(1.0)
        assert world.service is not None
        assert world.service.everyone_told

    simulate(scenario)


def test_a_round_ends_at_its_goal_and_the_slowest_are_late() -> None:
    devices = [FakeDevice(f"device-{i}", training_s=1.0) for i in range(4)]
    slow = FakeDevice("slow", training_s=500.0)
    rules = settings(count=3, cohort=5, report_goal=4, minimum_reports=4, deadline_s=1e4)

    async def scenario() -> float:
        world = World(rules)
        await world.start()
        everyone = [asyncio.create_task(world.take_part(d)) for d in (*devices, slow)]
        await asyncio.gather(*everyone)
        return asyncio.get_running_loop().time()

    ended_at = simulate(scenario)
    assert 500.0 <= ended_at < 600.0  # the slow one trains once, the others do not wait for it
    assert [receipt.status for receipt in slow.receipts] == [ReceiptStatus.LATE]
    assert {tuple(device.trained) for device in devices} == {(1, 2, 3)}
    assert len(_finals([*devices, slow])) == 1


def _operated(killed: str) -> tuple[World, list[FakeDevice], list[int]]:
    """Ten rounds of seconds: paused after some, rolled back to round 2, and let go on."""
    devices = _devices(3)
    world = World(settings(count=10, cohort=3, minimum_reports=3, deadline_s=1e4))
    seen: list[int] = []

    async def wish(control: Control) -> None:
        kill = killed == "always" or (killed == "going back" and control.roll_back_to)
        await world.wish(control, killed=bool(kill))

    async def scenario() -> None:
        await world.start()
        everyone = asyncio.gather(*(world.take_part(device) for device in devices))
        await asyncio.sleep(10.0)
        await wish(Control(Wish.PAUSE))
        await asyncio.sleep(100.0)
        seen.append(world.rounds_done())
        await asyncio.sleep(100.0)
        seen.append(world.rounds_done())
        await wish(Control(Wish.PAUSE, roll_back_to=2))
        seen.append(world.rounds_done())
        await wish(Control(Wish.RUN))
        await everyone
        seen.append(world.rounds_done())

    simulate(scenario)
    return world, devices, seen


@pytest.mark.parametrize("killed", ["never", "always", "going back"])
def test_a_federation_is_paused_rolled_back_and_let_go_on(killed: str) -> None:
    world, devices, seen = _operated(killed)
    paused_at = seen[0]
    assert 3 <= paused_at <= 6
    assert seen == [paused_at, paused_at, 2, 10]
    # Rounds after the second were run again, from the same base with the same updates.
    assert _finals(devices) == _finals(_run(0, Faults(), count=3))
    history = world.store.history("sim")
    assert [o.number for o in history if o.attempt == 2] == list(range(3, paused_at + 1))
    assert world.store.control("sim") == Control(Wish.RUN)


def test_a_stopped_federation_tells_its_devices_and_can_go_on_later() -> None:
    devices = [FakeDevice(f"device-{i}", training_s=1.0) for i in range(3)]
    rules = settings(count=10, cohort=3, minimum_reports=3, deadline_s=1e4)

    async def scenario() -> list[int]:
        world = World(rules)
        await world.start()
        everyone = asyncio.gather(*(world.take_part(device) for device in devices))
        await asyncio.sleep(4.5)
        world.store.set_wish("sim", Wish.STOP)
        assert world.service is not None
        await world.service.look_at_control()
        await everyone
        stopped = world.store.load("sim")
        world.store.set_wish("sim", Wish.RUN)
        await world.service.look_at_control()
        await asyncio.gather(*(world.take_part(device) for device in devices))
        ended = world.store.load("sim")
        assert stopped is not None
        assert ended is not None
        return [stopped.rounds_done, ended.rounds_done]

    stopped_at, ended_at = simulate(scenario)
    assert 3 <= stopped_at <= 6
    assert ended_at == 10
    assert len(_finals(devices)) == 1


def test_a_federation_goes_on_with_other_rounds_after_a_restart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    devices = [FakeDevice(f"device-{i}", training_s=1.0 + 4 * i) for i in range(3)]
    before = settings(count=3, cohort=3, minimum_reports=3, deadline_s=1e4)
    after = settings(count=5, cohort=1, deadline_s=60.0)
    # A sum for one report alone, of which two are kept.
    after = replace(after, rounds=replace(after.rounds, weighting=Weighting.UNIFORM))

    async def scenario() -> World:
        world = World(before)
        await world.start()
        everyone = asyncio.gather(*(world.take_part(device) for device in devices))
        await asyncio.sleep(9.0 + 6.0)  # in the second round, two of three have reported
        await world.kill()
        snapshot = world.store.load("sim")
        assert snapshot is not None
        assert len(snapshot.reported) == 2
        world.settings = after
        await world.start()
        await everyone
        return world

    with caplog.at_level(logging.INFO):
        world = simulate(scenario)
    for line in (
        "sim begins, new in this store: 0 of 3 rounds are done",
        "sim: rounds.count was 3 and is 5",
        "sim: round 2 is abandoned for them",
        "sim goes on: 1 of 5 rounds are done",
    ):
        assert line in caplog.messages
    told = [(o.number, o.attempt, o.outcome, o.reports) for o in world.store.history("sim")]
    aggregated, abandoned = Outcome.AGGREGATED, Outcome.ABANDONED
    assert told[:2] == [(1, 1, aggregated, 3), (2, 1, abandoned, 2)]
    assert told[2:] == [(2, 2, aggregated, 1), *((n, 1, aggregated, 1) for n in (3, 4, 5))]
    assert len(_finals(devices)) == 1


def test_a_federation_stopped_before_its_first_round_tells_so_too() -> None:
    device = FakeDevice("device")

    async def scenario() -> None:
        world = World(settings(count=3, cohort=1))
        await world.start()
        world.store.set_wish("sim", Wish.STOP)
        assert world.service is not None
        await world.service.look_at_control()
        await world.take_part(device)

    simulate(scenario)
    assert device.trained == []
    assert device.final is not None
    assert device.final.digest() == START.digest()


@pytest.mark.parametrize("killed", [False, True])
def test_who_was_asked_longest_ago_comes_first_also_after_a_restart(killed: bool) -> None:
    devices = [FakeDevice(f"device-{i}", training_s=1.0) for i in range(6)]
    rules = settings(
        count=6, cohort=2, minimum_reports=2, deadline_s=1e4, selection=Selection.LEAST_RECENT
    )

    async def scenario() -> None:
        world = World(rules)
        await world.start()
        everyone = [asyncio.create_task(world.take_part(device)) for device in devices]
        if killed:
            await asyncio.sleep(4.5)  # some rounds are over and one is open
            await world.kill()
            await world.start()
        await asyncio.gather(*everyone)

    simulate(scenario)
    if not killed:  # every device twice; after a kill some may be away when the next is chosen
        assert {len(device.trained) for device in devices} == {2}
    assert max(len(device.trained) for device in devices) <= 3
    assert min(len(device.trained) for device in devices) >= 1


def test_a_device_with_too_few_examples_is_refused_for_good() -> None:
    device = FakeDevice("poor")

    async def scenario() -> None:
        world = World(settings(count=1, cohort=1, minimum_examples=1000))
        await world.start()
        await world.take_part(device)

    with pytest.raises(RefusedError, match=r"ineligible.*has \d+ examples.*asks for 1000"):
        simulate(scenario)


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("jumping_s", [3600.0, 1e9], ids=["an hour", "decades"])
def test_a_clock_that_jumps_loses_nothing(mode: Mode, jumping_s: float) -> None:
    rules = settings(mode=mode, count=4, cohort=4, report_goal=3, deadline_s=600.0)
    for seed in range(5):
        print(f"seed {seed}")
        outcome = run(rules, _devices(4), seed, FAULTY, crashing=0.01, jumping_s=jumping_s)
        hold_in_every_round(outcome)
        assert made_again(outcome, seed) == outcome.versions


@pytest.mark.parametrize("restarted", [False, True], ids=["meanwhile", "before a restart"])
def test_a_clock_that_is_set_back_holds_no_round_up(restarted: bool) -> None:
    """A round with a device that never reports ends by its deadline, whatever the date is then."""
    rules = settings(count=1, cohort=2, deadline_s=60.0)

    async def scenario() -> float:
        world = World(rules)
        world.clock_off_s = 1e9
        await world.start()
        devices = FakeDevice("quick", training_s=1.0), FakeDevice("gone", training_s=1e6)
        quick, gone = (asyncio.create_task(world.take_part(device)) for device in devices)
        await asyncio.sleep(10.0)
        world.clock_off_s = 0.0
        if restarted:
            await world.kill()
            await world.start()
        await quick
        gone.cancel()
        return asyncio.get_running_loop().time()

    assert simulate(scenario) < 10.0 + 2 * rules.rounds.deadline_s + 30.0  # held, at most


def test_what_a_device_may_not_say_ends_its_run_and_is_not_tried_for_a_day() -> None:
    device = FakeDevice("too-many", fingerprint="no fingerprint")
    world = World(settings())

    async def scenario() -> None:
        await world.start()
        with pytest.raises(LocalProtocolError, match=r"CheckIn\.fingerprint"):
            await world.take_part(device)

    simulate(scenario)
    assert len(world.device_ends) == 1
