"""The kill harness: a real coordinator process on real SQLite, killed at random points.

Devices are sessions over real websockets whose training is a fixed function, so that what the
federation must end with is known to the byte from a simulation that nothing disturbs. Now and then
a device is cut off and starts again from what it remembers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from coordinator.base_version import BaseVersion
from coordinator.store.base import ReportRecord, StoredReports
from coordinator.store.memory import MemoryStore
from coordinator.store.schema import members, reports
from coordinator.store.sql import SqlStore
from protocol.federation import Mode
from protocol.messages import ReceiptStatus
from protocol.virtual_time import simulate
from tests.integration.daemon import Daemon, write_federation
from tests.simulation.world import START, FakeDevice, World, settings

DEVICES = 6


@pytest.mark.parametrize(
    "kills", [8, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
def test_kills_at_random_points_lose_nothing_and_count_nothing_twice(
    tmp_path: Path, kills: int
) -> None:
    seed = 20 + kills
    print(f"seed {seed}")
    rules = {"count": 2 * kills, "cohort": DEVICES, "minimum_reports": DEVICES}
    harness = Harness(tmp_path, rules, kills, random.Random(seed))
    asyncio.run(harness.run())
    print(f"killed the coordinator {harness.killed} times, devices {harness.cut} times")
    assert harness.killed == kills
    assert {device.final.digest() for device in harness.devices if device.final} == {
        _undisturbed(harness.rounds)
    }
    assert all(device.final for device in harness.devices)
    for device in harness.devices:
        # A device that is cut off while it trains begins that round again.
        assert set(device.trained) == set(range(1, harness.rounds + 1))
        assert len({receipt.assignment for receipt in device.receipts}) == harness.rounds
        statuses = {receipt.status for receipt in device.receipts}
        assert statuses <= {ReceiptStatus.ACCEPTED, ReceiptStatus.DUPLICATE}
    store = SqlStore(f"sqlite:///{tmp_path}/pf2lora.sqlite")
    history = store.history("sim")
    store.close()
    assert [(o.number, o.outcome.value, o.reports) for o in history] == [
        (number, "aggregated", DEVICES) for number in range(1, harness.rounds + 1)
    ]


@pytest.mark.parametrize(
    "kills", [8, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
def test_an_asynchronous_federation_is_what_was_in_its_buffers_however_often_killed(
    tmp_path: Path, kills: int
) -> None:
    seed = 40 + kills
    print(f"seed {seed}")
    goal, cohort = 4, DEVICES - 1
    rounds = 6 * kills
    rules = {"count": rounds, "cohort": cohort, "mode": "asynchronous", "report_goal": goal}
    harness = Harness(tmp_path, rules, kills, random.Random(seed))
    for number, device in enumerate(harness.devices):
        device.training_s = 0.02 * 3**number  # the slowest takes 243 times as long
    asyncio.run(harness.run())
    print(f"killed the coordinator {harness.killed} times, devices {harness.cut} times")
    assert harness.killed == kills
    with contextlib.closing(SqlStore(f"sqlite:///{tmp_path}/pf2lora.sqlite")) as store:
        history = store.history("sim")
        kept = _kept(store)
    counted = [assignment for buffer in kept.values() for assignment, _, _ in buffer]
    assert len(set(counted)) == len(counted) == rounds * goal
    for device in harness.devices:
        assert device.final is not None
        for receipt in device.receipts:
            is_kept = receipt.status in (ReceiptStatus.ACCEPTED, ReceiptStatus.DUPLICATE)
            assert (receipt.assignment in counted) == is_kept, receipt
    assert {outcome.reports for outcome in history} == {goal}
    versions = _made_again(harness.devices, kept, cohort, goal)
    assert [outcome.new_version for outcome in history] == versions
    assert {device.final.digest() for device in harness.devices if device.final} == {versions[-1]}
    stale = sum(given_in < number for number, rows in kept.items() for _, _, given_in in rows)
    print(f"{stale} of {len(counted)} reports were stale")
    assert stale


def _kept(store: SqlStore) -> dict[int, list[tuple[str, str, int]]]:
    """By round: assignment, device and the round it was given in, of each report that counts."""
    found: dict[int, list[tuple[str, str, int]]] = {}
    given = sa.select(reports.c.number, members).select_from(reports.join(members))
    with store.database.begin() as db:
        for number, assignment, _, given_in, _, device, _ in db.execute(given):
            found.setdefault(number, []).append((assignment, device, given_in))
    return found


def _made_again(
    devices: list[FakeDevice], kept: dict[int, list[tuple[str, str, int]]], cohort: int, goal: int
) -> list[bytes]:
    """The base versions that these buffers make, without a coordinator."""
    rules = settings(
        mode=Mode.ASYNCHRONOUS, count=len(kept), cohort=cohort, report_goal=goal, deadline_s=1e5
    )
    by_id = {device.id: device for device in devices}
    bases = [START]
    for number in sorted(kept):
        current = BaseVersion(rules, bases[-1], None)
        for assignment, name, given_in in kept[number]:
            device = by_id[name]
            update = device.update(given_in, bases[given_in - 1])
            staleness = number - given_in
            record = ReportRecord(
                assignment=assignment,
                device=name,
                round=number,
                attempt=1,
                examples=device.examples,
                metrics=(),
                received_at=0.0,
                update=update,
                base_version=bases[given_in - 1].digest(),
                signature=bytes(64),
                staleness=staleness,
            )
            current.add(record)
        store = MemoryStore()
        store.create(rules, START)
        base, _ = current.following(StoredReports(store, rules, number, 1))
        bases.append(base)
    return [base.digest() for base in bases[1:]]


def _devices() -> list[FakeDevice]:
    return [FakeDevice(f"device-{number}", training_s=0.05) for number in range(DEVICES)]


def _undisturbed(rounds: int) -> bytes:
    """The final adapter's digest of the same federation when nothing goes wrong."""
    rules = settings(count=rounds, cohort=DEVICES, minimum_reports=DEVICES, deadline_s=1e5)
    devices = _devices()

    async def scenario() -> None:
        world = World(rules)
        await world.start()
        await asyncio.gather(*(world.take_part(device) for device in devices))

    simulate(scenario)
    (digest,) = {device.final.digest() for device in devices if device.final}
    return digest


@dataclass
class Harness:
    """One federation, and who disturbs it."""

    folder: Path
    rules: dict[str, Any]  # its [rounds]
    kills: int
    rng: random.Random
    killed: int = 0
    cut: int = 0
    devices: list[FakeDevice] = field(default_factory=_devices)

    @property
    def rounds(self) -> int:
        return int(self.rules["count"])

    async def run(self) -> None:
        daemon = Daemon(write_federation(self.folder, **self.rules))
        await daemon.start()
        running = [asyncio.create_task(self._take_part(device, daemon)) for device in self.devices]
        everyone = asyncio.gather(*running)
        try:
            while self.killed < self.kills:
                await self._next_kill()
                await daemon.kill()
                self.killed += 1
                await daemon.start()
            await everyone
        finally:
            everyone.cancel()
            await daemon.kill()

    async def _next_kill(self) -> None:
        """At a random moment; sooner on a machine so quick that rounds would run out."""
        last_round = self.rounds * (self.killed + 1) / (self.kills + 1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.uniform(0.0, 1.5)):
                while self._rounds_begun() < last_round:  # noqa: ASYNC110 - in real time anyway
                    await asyncio.sleep(0.01)

    def _rounds_begun(self) -> int:
        return max((device.trained[-1] for device in self.devices if device.trained), default=0)

    async def _take_part(self, device: FakeDevice, daemon: Daemon) -> None:
        """One device; cut off now and then in the middle of whatever it does."""
        while device.final is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.rng.uniform(1.0, 10.0)):
                    await daemon.session(device).run()
                    return
            self.cut += 1
