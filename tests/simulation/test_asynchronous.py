"""Buffered asynchronous federations under faults and crashes, and what they owe to any seed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coordinator.control import Control, Wish
from protocol.aggregation import (
    Aggregation,
    CoordinateMedian,
    FedAdam,
    Mean,
    NormBound,
    ServerStep,
    TrimmedMean,
)
from protocol.fake_link import Faults
from protocol.federation import FederationSettings, Mode, Selection
from protocol.messages import ReceiptStatus
from protocol.tensors import NamedTensors
from protocol.virtual_time import simulate
from tests.simulation.laws import Outcome, WatchedStore, hold_in_every_round, made_again, run
from tests.simulation.world import START, FakeDevice, World, settings

GOAL = 3
ROUNDS = 8
FAULTY = Faults(drop=0.02, duplicate=0.02, cut=0.02, delay_s=1.0)


def _rules(**rounds: Any) -> FederationSettings:
    chosen = {"count": ROUNDS, "cohort": 5, "report_goal": GOAL, "deadline_s": 200.0} | rounds
    return settings(mode=Mode.ASYNCHRONOUS, **chosen)


def _devices(count: int = 7) -> list[FakeDevice]:
    """Some are ten times slower than others."""
    return [FakeDevice(f"device-{i}", training_s=1.0 + 3.0 * (i % 4)) for i in range(count)]


def _hold(outcome: Outcome) -> None:
    """The laws of the mode."""
    hold_in_every_round(outcome)
    for buffer in outcome.store.buffers:
        assert len(buffer.reports) == outcome.rules.rounds.goal
        for report in buffer.reports:
            assert 0 <= report.staleness <= outcome.rules.rounds.staleness_max
    assert outcome.store.most_under_way <= outcome.rules.rounds.cohort


def _explore(seeds: range) -> None:
    crashes = stale = 0
    for seed in seeds:
        print(f"seed {seed}")
        outcome = run(_rules(), _devices(), seed, FAULTY, crashing=0.03)
        _hold(outcome)
        assert made_again(outcome, seed) == outcome.versions
        crashes += outcome.store.crashes
        stale += sum(r.staleness > 0 for b in outcome.store.buffers for r in b.reports)
    assert crashes > len(seeds)
    assert stale > len(seeds)


def test_whatever_fails_each_kept_report_counts_once_against_the_base_it_was_given() -> None:
    _explore(range(60))


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_no_round_has_more_than_its_goal_however_many_report_at_once(mode: Mode) -> None:
    rules = settings(mode=mode, count=6, cohort=7, report_goal=2, deadline_s=1000.0)
    for seed in range(10):
        print(f"seed {seed}")
        devices = [FakeDevice(f"device-{i}", training_s=5.0) for i in range(7)]
        outcome = run(rules, devices, seed, Faults(), crashing=0.01, writing_s=0.5)
        hold_in_every_round(outcome)
        assert {len(buffer.reports) for buffer in outcome.store.buffers if buffer.base} == {2}
        assert made_again(outcome, seed) == outcome.versions


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_thousands_of_seeds() -> None:
    _explore(range(1000, 5000))


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        (NormBound(0.2), FedAdam()),
        (CoordinateMedian(), FedAdam()),
        (TrimmedMean(0.34), None),
        (Mean(), FedAdam()),
    ],
    ids=lambda one: one.NAME if one else "average",
)
def test_every_rule_and_server_step_survives_crashes(
    rule: Aggregation, step: ServerStep | None
) -> None:
    rules = replace(_rules(), aggregation=rule)
    if step:
        rules = replace(rules, server_step=step)
    for seed in range(5):
        print(f"seed {seed}")
        outcome = run(rules, _devices(), seed, Faults(delay_s=1.0), crashing=0.03)
        _hold(outcome)
        assert made_again(outcome, seed) == outcome.versions


def test_a_stale_update_is_scaled_down_and_the_buffer_averaged_as_a_round() -> None:
    outcome = run(_rules(), _devices(), 1, Faults(), crashing=0.0)
    before = START
    for buffer in outcome.store.buffers:
        assert buffer.base is not None
        weights = [report.examples for report in buffer.reports]
        scaled = [r.update.flat() / np.sqrt(1 + r.staleness) for r in buffer.reports]
        wanted = before.flat() + np.average(scaled, 0, weights)
        assert np.abs(buffer.base.flat() - wanted).max() < 1e-6
        before = buffer.base
    assert {r.staleness for b in outcome.store.buffers for r in b.reports} >= {0, 1, 2}


def test_a_slow_device_holds_nobody_up_and_still_counts() -> None:
    def took_s(rules: FederationSettings) -> tuple[float, list[FakeDevice]]:
        quick = [FakeDevice(f"device-{i}", training_s=1.0) for i in range(4)]
        slow = FakeDevice("slow", training_s=9.5)

        async def scenario() -> float:
            world = World(rules)
            await world.start()
            everyone = asyncio.gather(*(world.take_part(d) for d in (*quick, slow)))
            await everyone
            return world.store.history("sim")[-1].closed_at

        return simulate(scenario), [slow]

    waiting_s, _ = took_s(settings(count=12, cohort=5, minimum_reports=5, deadline_s=1e4))
    rules = _rules(count=12, cohort=5, report_goal=4)
    buffered_s, (slow,) = took_s(rules)
    assert buffered_s < waiting_s / 5
    assert ReceiptStatus.ACCEPTED in {receipt.status for receipt in slow.receipts}


def test_what_is_too_stale_or_over_its_deadline_is_late_and_told_why() -> None:
    for rules, said in (
        (_rules(staleness_max=2, deadline_s=1e4), "versions old, 2 at most count"),
        (_rules(deadline_s=20.0), "its assignment is over"),
    ):
        quick = [FakeDevice(f"device-{i}", training_s=1.0) for i in range(4)]
        slow = FakeDevice("slow", training_s=40.0)

        async def scenario(rules: Any = rules, devices: Any = (*quick, slow)) -> None:
            world = World(replace(rules, rounds=replace(rules.rounds, count=100)))
            await world.start()
            await asyncio.gather(*(world.take_part(device) for device in devices))

        simulate(scenario)
        assert slow.receipts[0].status is ReceiptStatus.LATE
        assert said in slow.receipts[0].reason


def test_no_more_than_the_cohort_train_and_the_rest_take_their_turns() -> None:
    devices = _devices(12)
    rules = _rules(cohort=3, count=20, selection=Selection.LEAST_RECENT)
    store = WatchedStore()

    async def scenario() -> None:
        world = World(rules, store=store)
        await world.start()
        await asyncio.gather(*(world.take_part(device) for device in devices))

    simulate(scenario)
    assert store.most_under_way == 3
    assert all(device.trained for device in devices)


def test_a_vanished_devices_place_is_free_after_its_deadline() -> None:
    lost, other = FakeDevice("lost", training_s=1e9), FakeDevice("other", training_s=1.0)

    async def scenario() -> float:
        world = World(_rules(cohort=1, count=2, report_goal=1, deadline_s=60.0))
        await world.start()
        first = asyncio.create_task(world.take_part(lost))
        await asyncio.sleep(5.0)
        first.cancel()
        await world.take_part(other)
        return asyncio.get_running_loop().time()

    assert 60.0 < simulate(scenario) < 75.0


@pytest.mark.parametrize("killed", [False, True])
def test_paused_rolled_back_stopped_and_let_go_on(killed: bool) -> None:
    devices = [FakeDevice(f"device-{i}", training_s=1.0 + i) for i in range(4)]
    world = World(_rules(count=30))
    seen: list[int] = []

    async def wish(control: Control) -> None:
        await world.wish(control, killed=killed)

    async def scenario() -> None:
        await world.start()
        everyone = asyncio.gather(*(world.take_part(device) for device in devices))
        await asyncio.sleep(12.0)
        await wish(Control(Wish.PAUSE))
        await asyncio.sleep(100.0)  # those under way have reported
        seen.append(world.rounds_done())
        await asyncio.sleep(100.0)
        seen.append(world.rounds_done())
        await wish(Control(Wish.PAUSE, roll_back_to=2))
        seen.append(world.rounds_done())
        await wish(Control(Wish.RUN))
        await asyncio.sleep(6.0)
        await wish(Control(Wish.STOP))
        await everyone
        seen.append(world.rounds_done())
        await wish(Control(Wish.RUN))
        await asyncio.gather(*(world.take_part(device) for device in devices))
        seen.append(world.rounds_done())

    simulate(scenario)
    paused, still, back, stopped, ended = seen
    assert 3 <= paused == still
    assert (back, ended) == (2, 30)
    assert 2 < stopped < 30
    assert len({device.final.digest() for device in devices if device.final}) == 1


def test_a_device_whose_update_is_refused_waits_for_the_next_buffer() -> None:
    def poisoned(update: NamedTensors) -> NamedTensors:
        return NamedTensors.from_flat(update.specs, np.full_like(update.flat(), np.nan))

    bad = FakeDevice("bad", training_s=0.1, damage=poisoned)
    good = [FakeDevice(f"device-{i}", training_s=10.0) for i in range(3)]

    async def scenario() -> None:
        world = World(_rules(count=4))
        await world.start()
        await asyncio.gather(*(world.take_part(device) for device in (bad, *good)))

    simulate(scenario)
    assert {receipt.status for receipt in bad.receipts} == {ReceiptStatus.REJECTED}
    assert len(bad.receipts) <= 5  # one a buffer
    assert all(device.final for device in good)
