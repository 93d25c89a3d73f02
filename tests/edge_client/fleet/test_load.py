"""Whole load tests on a virtual clock: real sessions, a real federation, fake links."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coordinator.store.devices import DeviceStatus
from edge_client.fleet.device import SimulatedDevice
from edge_client.fleet.download import CheckedDownload
from edge_client.fleet.figures import Figures
from edge_client.fleet.load import Fleet
from edge_client.fleet.plan import Between, Plan
from edge_client.fleet.updates import VARIANTS, MadeUpUpdates
from protocol.errors import RemoteProtocolError
from protocol.federation import Mode, WireDtype
from protocol.link import Link
from protocol.messages import Assignment, Chunk
from protocol.methods import PFedLoRA
from protocol.tensors import NamedTensors
from protocol.transfer import chunks
from protocol.virtual_time import at_once, simulate
from tests.simulation.world import START, World, settings

ROUNDS, DEVICES = 4, 16
ALL = {"count": ROUNDS, "cohort": DEVICES, "minimum_reports": DEVICES, "deadline_s": 1e5}


def _plan(**changes: Any) -> Plan:
    return replace(Plan(DEVICES, "1", training_time=Between(1, 5)), **changes)


def _run(plan: Plan, world: World, beside: Any = None) -> tuple[Figures, float]:
    """A load test of this world to its end; what it found and how long it took."""

    async def scenario() -> tuple[Figures, float]:
        await world.start()
        fleet = Fleet(plan, world.dial, "sim", aside=at_once)
        if beside:
            async with asyncio.TaskGroup() as group:
                other = group.create_task(beside(fleet))
                await fleet.run()
                other.cancel()
        else:
            await fleet.run()
        return fleet.figures, asyncio.get_running_loop().time()

    return simulate(scenario)


def test_every_device_reports_in_every_round() -> None:
    world = World(settings(**ALL))
    figures, _ = _run(_plan(), world)
    assert figures.accepted == ROUNDS * DEVICES == figures.assignments
    assert figures.rounds == ROUNDS == world.rounds_done()
    assert figures.joined == DEVICES
    assert (figures.errors, figures.connected, figures.resumed) == ({}, 0, 0)
    assert {samples.count for samples in figures.latencies.values()} == {DEVICES, ROUNDS * DEVICES}


def test_a_seed_replays_a_test() -> None:
    plan = _plan(dropout=0.3, stragglers=0.2, seed="replayed")
    first, again = (_run(plan, World(settings(**ALL)))[0].values() for _ in range(2))
    assert first == again
    other = _run(_plan(dropout=0.3, stragglers=0.2, seed="other"), World(settings(**ALL)))[0]
    assert other.values() != first


def test_who_drops_out_comes_back_and_no_report_is_lost() -> None:
    figures, _ = _run(_plan(dropout=0.5), World(settings(**ALL)))
    assert figures.dropouts > DEVICES
    assert figures.resumed == figures.dropouts
    assert figures.accepted == ROUNDS * DEVICES
    assert figures.errors == {}  # what was planned is no error


def test_who_is_sent_away_goes_on_waiting() -> None:
    """A coordinator holds a device for 20 s; the first round needs the last device, at 60 s."""
    figures, _ = _run(_plan(spawn_rate=DEVICES / 60.0), World(settings(**ALL | {"count": 1})))
    waits = figures.latencies["check_in"]
    assert waits.max_s == pytest.approx(60.0, abs=5.0)
    assert 25.0 < (waits.percentile(50) or 0.0) < 35.0


def test_a_download_that_is_cut_goes_on_being_timed() -> None:
    async def scenario() -> Figures:
        figures = Figures()
        updates = MadeUpUpdates("1", at_once)
        device = SimulatedDevice(0, _plan(devices=1), World(settings()).dial, figures, updates)
        payload = START.payload()
        for wait_s, until_cut_s in ((10.0, 4.0), (1.0, 3.0)):
            await device.prepare(settings())
            device.offer()
            await asyncio.sleep(wait_s)
            device.held(payload.digest)
            await asyncio.sleep(until_cut_s)
        await device.train(Assignment("a", 1, payload.digest, 60.0, payload), START)
        return figures

    times = simulate(scenario).latencies
    assert (times["check_in"].max_s, times["download"].max_s) == (10.0, 8.0)


def test_a_cut_comes_while_training_and_while_sending_too() -> None:
    figures, _ = _run(_plan(dropout=1.0), World(settings(**ALL)))
    # Who was cut while it sent does not train again, so it is not given its assignment again.
    assert ROUNDS * DEVICES < figures.assignments < 2 * ROUNDS * DEVICES
    assert figures.accepted == ROUNDS * DEVICES


def test_stragglers_are_late_where_a_round_does_not_wait_for_them() -> None:
    goal = DEVICES - 4
    rules = settings(**ALL | {"report_goal": goal, "minimum_reports": 1})
    figures, _ = _run(_plan(stragglers=0.1, straggler_time_s=500.0), World(rules))
    assert figures.stragglers > 0
    assert figures.late > 0
    assert figures.accepted >= ROUNDS * goal


def test_a_coordinator_that_dies_and_comes_back_is_gone_on_with() -> None:
    world = World(settings(**ALL))

    async def torment(fleet: Fleet) -> None:
        for _ in range(3):
            await asyncio.sleep(2.5)
            await world.kill()
            await asyncio.sleep(4.0)
            await world.start()

    figures, _ = _run(_plan(), world, torment)
    assert figures.accepted == ROUNDS * DEVICES
    assert figures.resumed >= DEVICES
    assert set(figures.errors) == {"connection_lost", "no_connection"}


def test_asynchronous_rounds_are_counted_by_base_versions() -> None:
    rules = settings(count=6, cohort=DEVICES, report_goal=4, mode=Mode.ASYNCHRONOUS)
    figures, _ = _run(_plan(), World(rules))
    assert figures.rounds == 6
    assert figures.accepted >= 24


@pytest.mark.parametrize("dtype", list(WireDtype))
def test_updates_are_of_the_federations_type(dtype: WireDtype) -> None:
    figures, _ = _run(_plan(), World(replace(settings(**ALL), update_dtype=dtype)))
    assert figures.accepted == ROUNDS * DEVICES
    assert figures.errors == {}


def test_devices_whose_backbones_differ_are_simulated_too() -> None:
    rules = replace(settings(**ALL), backbone=None, algorithm=PFedLoRA())
    figures, _ = _run(_plan(), World(rules))
    assert figures.accepted == ROUNDS * DEVICES
    assert figures.errors == {}


# --- ends -----------------------------------------------------------------------------------------


def test_it_ends_after_its_rounds_with_every_receipt_though_the_federation_goes_on() -> None:
    world = World(settings(**ALL | {"count": 100}))
    figures, _ = _run(_plan(rounds=3), world)
    assert figures.rounds == 3
    assert figures.accepted == 3 * DEVICES
    assert world.rounds_done() == 3


def test_it_ends_when_its_time_is_over_wherever_it_stands() -> None:
    world = World(settings(**ALL | {"count": 100_000}))
    figures, took_s = _run(_plan(run_time_s=60.0), world)
    assert took_s == pytest.approx(60.0, abs=1.0)
    assert figures.accepted > 0
    assert figures.errors == {}  # that it ends is nobody's fault
    assert figures.connected == 0


def test_it_ends_when_it_is_told_to() -> None:
    async def stop(fleet: Fleet) -> None:
        await asyncio.sleep(33.0)
        fleet.stopping.set()

    figures, took_s = _run(_plan(), World(settings(**ALL | {"count": 100_000})), stop)
    assert took_s == pytest.approx(33.0, abs=1.0)
    assert figures.accepted > 0
    assert figures.errors == {}  # that it ends is nobody's fault


def test_devices_begin_at_a_rate() -> None:
    seen: list[int] = []

    async def look(fleet: Fleet) -> None:
        for _ in range(3):
            await asyncio.sleep(2.0)
            seen.append(fleet.figures.joined)

    _run(_plan(spawn_rate=1.0, run_time_s=20.0), World(settings(**ALL)), look)
    assert seen == pytest.approx([3, 5, 7], abs=1)


# --- nobody is let in -----------------------------------------------------------------------------


def test_one_that_is_refused_speaks_for_all() -> None:
    async def scenario() -> Figures:
        world = World(settings(**ALL))
        await world.start()
        fleet = Fleet(_plan(), world.dial, "another", aside=at_once)
        await fleet.run()
        return fleet.figures

    figures = simulate(scenario)
    assert (figures.joined, figures.error_count) == (0, 1)
    assert "sim" in figures.errors["unknown_federation"].first


def test_devices_that_wait_for_approval_are_errors_until_they_have_it() -> None:
    world = World(settings(**ALL), is_open=False)

    async def approve(fleet: Fleet) -> None:
        await asyncio.sleep(30.0)
        assert len(world.store.devices.all()) == DEVICES
        assert fleet.figures.joined == 0
        for record in world.store.devices.all():
            world.store.devices.set_status(record.device, DeviceStatus.APPROVED, "")

    figures, _ = _run(_plan(), world, approve)
    assert figures.accepted == ROUNDS * DEVICES
    assert figures.errors["pending"].count >= DEVICES


def test_nobody_listens() -> None:
    async def scenario() -> tuple[Figures, float]:
        fleet = Fleet(_plan(), World(settings(**ALL)).dial, "sim", aside=at_once)
        await fleet.run()
        return fleet.figures, asyncio.get_running_loop().time()

    figures, took_s = simulate(scenario)
    assert set(figures.errors) == {"no_connection"}
    assert took_s < 60.0  # the first device's patience, not that of all


def test_a_coordinator_that_never_answers() -> None:
    class Silent:
        channel = b""

        async def send(self, data: bytes) -> None: ...

        async def receive(self) -> bytes:
            await asyncio.sleep(1e6)
            return b""

        async def close(self) -> None: ...

    async def dial() -> Link:
        return Silent()

    async def scenario() -> Figures:
        fleet = Fleet(_plan(run_time_s=200.0), dial, "sim", aside=at_once)
        await fleet.run()
        return fleet.figures

    figures = simulate(scenario)
    assert set(figures.errors) == {"no_answer"}
    assert (figures.joined, figures.connected) == (0, 0)


# --- memory ---------------------------------------------------------------------------------------


def test_devices_share_their_updates_and_keep_no_base_version() -> None:
    base = NamedTensors.from_arrays({"w": np.ones((1000, 1000), np.float32)})
    world = World(settings(**ALL), base=base)

    async def count(fleet: Fleet) -> None:
        await fleet.figures.began.wait()
        await asyncio.sleep(40.0)
        assert len(fleet.figures.under_way) == DEVICES  # all of them train
        gc.collect()
        buffers = {
            id(one.buffer)
            for one in gc.get_objects()
            if type(one) is NamedTensors and len(one.buffer) == len(base.buffer)
        }
        # The coordinator's own, and the zeros that downloads share.
        assert len(buffers) <= VARIANTS + 3

    figures, _ = _run(_plan(training_time=Between(50, 60)), world, count)
    assert figures.accepted == ROUNDS * DEVICES


def test_updates_differ_a_little_and_are_made_once() -> None:
    async def make() -> list[NamedTensors]:
        updates = MadeUpUpdates("seed", at_once)
        return [await updates.like(START.specs, WireDtype.FLOAT32, n) for n in range(2 * VARIANTS)]

    made = _at_once(make())
    assert len({id(update) for update in made}) == VARIANTS
    assert len({update.digest() for update in made}) == VARIANTS
    assert all(0 < np.abs(update.flat()).max() < 1e-2 for update in made)


def test_a_download_is_checked_to_the_last_byte() -> None:
    payload = START.payload()
    good = CheckedDownload(payload)
    for chunk in chunks(START.buffer, 0, 100):
        good.accept(chunk)
    assert good.tensors().specs == START.specs
    bad = CheckedDownload(payload)
    bad.accept(Chunk(0, True, bytes(len(START.buffer))))
    with pytest.raises(RemoteProtocolError, match="digest"):
        bad.tensors()


def _at_once(doing: Coroutine[Any, Any, Any]) -> Any:
    async def scenario() -> Any:
        return await doing

    return simulate(scenario)
