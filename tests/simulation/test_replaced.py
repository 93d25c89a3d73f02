"""A device of the cohort that vanishes is replaced by one that waits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from protocol.fake_link import Faults
from protocol.messages import ReceiptStatus
from protocol.virtual_time import simulate
from tests.simulation.laws import hold_in_every_round, made_again, run
from tests.simulation.world import FakeDevice, World, settings


def _vanishing(
    rules: Any, devices: list[FakeDevice], gone_at_s: float, back_at_s: float | None = None
) -> tuple[World, FakeDevice, FakeDevice]:
    """One of the first cohort goes away; who is in it then, and who never came back."""
    found: dict[str, Any] = {}

    async def scenario() -> None:
        world = World(rules)
        await world.start()
        tasks = {device.id: asyncio.create_task(world.take_part(device)) for device in devices}
        await asyncio.sleep(gone_at_s)
        snapshot = world.store.load("sim")
        assert snapshot is not None
        assert snapshot.open_round is not None
        asked = [member.device for member in snapshot.open_round.cohort]
        by_name = {device.id: device for device in devices}
        lost = by_name[asked[0]]
        (spare,) = (by_name[name] for name in by_name if name not in asked)
        found.update(world=world, lost=lost, spare=spare)
        tasks.pop(lost.id).cancel()
        if back_at_s is not None:
            await asyncio.sleep(back_at_s - gone_at_s)
            lost.training_s = min(lost.training_s, 100.0)
            tasks[lost.id] = asyncio.create_task(world.take_part(lost))
        await asyncio.gather(*tasks.values())

    simulate(scenario)
    return found["world"], found["lost"], found["spare"]


def _devices(training_s: float = 50.0) -> list[FakeDevice]:
    return [FakeDevice(f"device-{i}", training_s=training_s) for i in range(4)]


def test_the_round_is_done_with_the_spare_long_before_its_deadline() -> None:
    rules = settings(count=1, cohort=3, minimum_reports=3, deadline_s=1000.0)
    world, lost, spare = _vanishing(rules, _devices(), gone_at_s=20.0)
    (outcome,) = world.store.history("sim")
    assert (outcome.outcome.value, outcome.reports) == ("aggregated", 3)
    # Gone after 20 s, given up 100 s later, and then 50 s of training.
    assert 170.0 <= outcome.closed_at < 200.0
    assert (lost.trained, spare.trained) == ([1], [1])
    assert [receipt.status for receipt in spare.receipts] == [ReceiptStatus.ACCEPTED]


def test_one_that_comes_back_in_time_keeps_its_place() -> None:
    rules = settings(count=1, cohort=3, minimum_reports=3, deadline_s=1000.0)
    world, lost, spare = _vanishing(rules, _devices(), gone_at_s=20.0, back_at_s=80.0)
    assert world.store.history("sim")[0].closed_at < 150.0
    assert [receipt.status for receipt in lost.receipts] == [ReceiptStatus.ACCEPTED]
    assert spare.trained == []


def test_one_that_reports_after_it_was_replaced_still_counts() -> None:
    rules = settings(count=1, cohort=3, minimum_reports=3, deadline_s=10_000.0)
    devices = _devices(training_s=400.0)
    world, lost, spare = _vanishing(rules, devices, gone_at_s=300.0, back_at_s=440.0)
    (outcome,) = world.store.history("sim")
    assert outcome.reports == 3
    assert 540.0 <= outcome.closed_at < 600.0  # the spare, asked after 420 s, is still at it
    assert [receipt.status for receipt in lost.receipts] == [ReceiptStatus.ACCEPTED]
    assert [receipt.status for receipt in spare.receipts] == [ReceiptStatus.LATE]


def test_nobody_is_asked_when_less_than_half_of_the_deadline_is_left() -> None:
    rules = settings(count=1, cohort=3, minimum_reports=2, deadline_s=300.0)
    world, _, spare = _vanishing(rules, _devices(training_s=200.0), gone_at_s=140.0)
    (outcome,) = world.store.history("sim")
    assert outcome.reports == 2
    assert outcome.closed_at >= 300.0
    assert spare.trained == []


def test_the_assignment_of_a_spare_outlives_a_restart() -> None:
    rules = settings(count=1, cohort=3, minimum_reports=3, deadline_s=1000.0)
    devices = _devices()

    async def scenario() -> World:
        world = World(rules)
        await world.start()
        tasks = [asyncio.create_task(world.take_part(device)) for device in devices]
        await asyncio.sleep(20.0)
        snapshot = world.store.load("sim")
        assert snapshot is not None
        assert snapshot.open_round is not None
        asked = {member.device for member in snapshot.open_round.cohort}
        gone = next(i for i, device in enumerate(devices) if device.id in asked)
        tasks.pop(gone).cancel()
        await asyncio.sleep(120.0)  # the spare trains
        await world.kill()
        await world.start()
        await asyncio.gather(*tasks)
        return world

    world = simulate(scenario)
    (outcome,) = world.store.history("sim")
    assert (outcome.outcome.value, outcome.reports) == ("aggregated", 3)
    assert max(len(device.trained) for device in devices) == 1


def _explore(seeds: range) -> None:
    added = crashes = 0
    for seed in seeds:
        print(f"seed {seed}")
        devices = [FakeDevice(f"device-{i}", training_s=5.0 + 30.0 * (i % 3)) for i in range(7)]
        rules = settings(count=4, cohort=4, report_goal=3, minimum_reports=2, deadline_s=900.0)
        faults = Faults(drop=0.01, duplicate=0.01, cut=0.02, delay_s=1.0)
        outcome = run(rules, devices, seed, faults, crashing=0.03, vanishing=2.0)
        hold_in_every_round(outcome)
        assert made_again(outcome, seed) == outcome.versions
        for buffer in outcome.store.buffers:
            assert len(buffer.reports) <= 3
            assert {report.staleness for report in buffer.reports} <= {0}
        added += outcome.store.added
        crashes += outcome.store.crashes
    assert added > len(seeds) / 4
    assert crashes > len(seeds) / 2


def test_whatever_fails_no_report_is_lost_or_counted_twice() -> None:
    _explore(range(60))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_thousands_of_seeds() -> None:
    _explore(range(1000, 4000))
