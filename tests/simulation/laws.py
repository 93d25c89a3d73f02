"""Whole federations under faults and crashes, remembered, and what any of them owes to any seed."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field
from typing import Any

from coordinator.base_version import BaseVersion
from coordinator.store.base import ReportRecord, StoredReports
from protocol.fake_link import Faults
from protocol.federation import FederationSettings
from protocol.messages import ReceiptStatus
from protocol.tensors import NamedTensors
from protocol.virtual_time import simulate
from tests.simulation.world import START, CrashingStore, FakeDevice, World


@dataclass
class Buffer:
    """What was in a round when it was closed, and the base version made of it."""

    reports: list[ReportRecord]
    base: NamedTensors | None
    memory: NamedTensors | None


class WatchedStore(CrashingStore):
    """Remembers every buffer, and how many assignments were ever under way at once."""

    def __init__(self, seed: int = 0, probability: float = 0.0) -> None:
        super().__init__(seed, probability)
        self.buffers: list[Buffer] = []
        self.most_under_way = 0
        self.added = 0  # assignments after their round had opened

    def add_assignment(self, *arguments: Any) -> None:
        super().add_assignment(*arguments)
        self.added += 1
        snapshot = self.load("sim")
        assert snapshot is not None
        now = asyncio.get_running_loop().time()
        under_way = sum(one.deadline_at > now for one in snapshot.awaited)
        self.most_under_way = max(self.most_under_way, under_way)

    def close_round(self, *arguments: Any) -> None:
        federation, number, attempt, base, _, memory = arguments
        reports = list(self.reports(federation, number, attempt))
        before = len(self.history("sim"))
        try:
            super().close_round(*arguments)
        finally:
            if len(self.history("sim")) > before:
                self.buffers.append(Buffer(reports, base, memory))


@dataclass
class Outcome:
    """A federation that has come to its end."""

    rules: FederationSettings
    devices: list[FakeDevice]
    store: WatchedStore
    finals: set[bytes] = field(default_factory=set)

    @property
    def versions(self) -> list[bytes]:
        """The base versions that were made, in order."""
        return [buffer.base.digest() for buffer in self.store.buffers if buffer.base]


def run(
    rules: FederationSettings,
    devices: list[FakeDevice],
    seed: int,
    faults: Faults,
    crashing: float,
    vanishing: float = 0.0,
    writing_s: float = 0.0,
    jumping_s: float = 0.0,
) -> Outcome:
    """A federation to its end; its store dies at writes with the probability `crashing`.

    Devices go away for minutes, `vanishing` times each on average. A call of the store takes
    `writing_s`, in which more may come. The coordinator's clock is set anew every minute or so, up
    to `jumping_s` wrong either way.
    """
    outcome = Outcome(rules, devices, WatchedStore(seed, crashing))

    async def scenario() -> None:
        world = World(rules, seed, faults, outcome.store)
        world.writing_s = writing_s
        others = [asyncio.create_task(world.restart_after_failures())]
        if jumping_s:
            others.append(asyncio.create_task(_set_clocks(world, jumping_s)))
        await asyncio.gather(*(_take_part(world, device, vanishing) for device in devices))
        for task in others:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    simulate(scenario)
    outcome.finals = {device.final.digest() for device in devices if device.final}
    return outcome


async def _set_clocks(world: World, jumping_s: float) -> None:
    while True:
        world.clock_off_s = world.rng.uniform(-jumping_s, jumping_s)
        await asyncio.sleep(world.rng.random() * 120.0)


async def _take_part(world: World, device: FakeDevice, vanishing: float) -> None:
    while device.final is None:
        with contextlib.suppress(TimeoutError):
            goes = world.rng.random() < vanishing / (1.0 + vanishing)
            async with asyncio.timeout(world.rng.random() * 100.0 if goes else None):
                await world.take_part(device)
        await asyncio.sleep(world.rng.random() * 500.0)


def hold_in_every_round(outcome: Outcome) -> None:
    """What was acknowledged counts once, as its device made it of the base that it was given."""
    bases = [START]
    counted: list[str] = []
    for buffer in outcome.store.buffers:
        counted += [report.assignment for report in buffer.reports]
        for report in buffer.reports:
            given_in = report.round - report.staleness
            (device,) = [device for device in outcome.devices if device.id == report.device]
            wanted = device.update(given_in, bases[given_in - 1])
            assert bytes(report.update.buffer) == bytes(wanted.buffer)
        if buffer.base:
            bases.append(buffer.base)
    assert len(bases) == outcome.rules.rounds.count + 1
    assert outcome.finals == {bases[-1].digest()}
    assert len(set(counted)) == len(counted)
    for device in outcome.devices:
        for receipt in device.receipts:
            kept = receipt.status in (ReceiptStatus.ACCEPTED, ReceiptStatus.DUPLICATE)
            assert (receipt.assignment in counted) == kept, receipt


def made_again(outcome: Outcome, seed: int) -> list[bytes]:
    """The base versions from nothing but what was in which buffer, in another order."""
    base, memory, found = START, None, []
    for buffer in outcome.store.buffers:
        if not buffer.base:
            continue
        current = BaseVersion(outcome.rules, base, memory)
        shuffled = list(buffer.reports)
        random.Random(seed).shuffle(shuffled)
        current.add_all(shuffled)
        base, memory = current.following(_StoredReports(buffer.reports, outcome.rules))
        found.append(base.digest())
    return found


class _StoredReports(StoredReports):
    """A buffer's reports as the store gives them to a rule."""

    def __init__(self, reports: list[ReportRecord], rules: FederationSettings) -> None:
        super().__init__(_Kept(reports), rules, 1, 1)  # type: ignore[arg-type]


class _Kept:
    def __init__(self, reports: list[ReportRecord]) -> None:
        self._reports = reports

    def staleness(self, *_: object) -> list[int]:
        return [report.staleness for report in self._reports]

    def blocks(self, _: str, __: int, ___: int, begin: int, end: int) -> list[bytes]:
        return [bytes(report.update.buffer[begin:end]) for report in self._reports]
