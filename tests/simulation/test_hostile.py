"""One device in ten is hostile: the others end with the bytes that they end with alone."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_client.errors import RefusedError
from edge_client.identity import Identity
from protocol import codec
from protocol.connection import default_hello
from protocol.errors import ErrorCode
from protocol.federation import FederationSettings, Mode
from protocol.link import Link, LinkClosedError
from protocol.messages import Assignment, Challenge, CheckIn, Chunk, Fetch, Refusal, Report
from protocol.signing import UNSIGNED
from protocol.tensors import NamedTensors
from protocol.virtual_time import simulate
from tests.simulation.laws import Outcome, WatchedStore, hold_in_every_round
from tests.simulation.raw_device import RawDevice
from tests.simulation.world import FINGERPRINT, START, FakeDevice, World, settings

HONEST = 9
ROUNDS = 4
Attack = Callable[[Link], Awaitable[None]]
Hostile = Callable[[World], Coroutine[Any, Any, None]]


def _finals(devices: list[FakeDevice]) -> set[bytes]:
    return {device.final.digest() for device in devices if device.final}


def _federation(hostile: Hostile | None) -> list[FakeDevice]:
    cohort = HONEST + (hostile is not None)
    rules = settings(
        count=ROUNDS, cohort=cohort, report_goal=HONEST, minimum_reports=HONEST, deadline_s=1e4
    )
    return _run(rules, hostile)


def _run(
    rules: FederationSettings,
    hostile: Hostile | None,
    store: WatchedStore | None = None,
) -> list[FakeDevice]:
    devices = [FakeDevice(f"device-{i}", training_s=2.0) for i in range(HONEST)]

    async def scenario() -> None:
        world = World(rules, store=store)
        await world.start()
        tasks = [asyncio.create_task(hostile(world))] if hostile else []
        try:
            await asyncio.gather(*(world.take_part(device) for device in devices))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert world.service is not None
        assert not world.service.failure.done()

    simulate(scenario)
    return devices


async def _again(attack: Attack, world: World) -> None:
    """An attack on a new connection as soon as the last one has been cut off."""
    while True:
        with contextlib.suppress(LinkClosedError):
            link = await world.dial()
            await attack(link)
            while True:  # listen until the coordinator hangs up
                await link.receive()
        await asyncio.sleep(0.2)


async def _joined(link: Link) -> RawDevice:
    device = RawDevice(link, Identity.named("hostile"))
    await device.join()
    return device


async def _garbage(link: Link) -> None:
    await link.send(random.Random(1).randbytes(4000))


async def _silence(link: Link) -> None:
    await link.send(codec.encode(default_hello("hostile")))


async def _out_of_turn(link: Link) -> None:
    await _joined(link)
    await link.send(codec.encode(Chunk(0, True, b"not asked for")))


async def _flood(link: Link) -> None:
    await _joined(link)
    for _ in range(500):
        await link.send(codec.encode(CheckIn(FINGERPRINT, 100)))


async def _takes_an_assignment_and_stalls(link: Link) -> None:
    device = await _joined(link)
    await device.send(CheckIn(FINGERPRINT, 100))


def _lying_about(change: Callable[[Report], Report], data: bytes) -> Attack:
    async def attack(link: Link) -> None:
        device = await _joined(link)
        answer = await device.ask(CheckIn(FINGERPRINT, 100))
        update = NamedTensors.from_flat(START.specs, np.zeros_like(START.flat()))
        honest = Report(
            getattr(answer, "assignment", "none"),
            getattr(answer, "round", 1),
            START.digest(),
            100,
            (),
            update.payload(),
            UNSIGNED,
        )
        await device.force(device.signed(change(honest)))
        await link.receive()
        await link.send(codec.encode(Chunk(0, True, data)))

    return attack


def _same(report: Report) -> Report:
    return report


ATTACKS: dict[str, Attack] = {
    "garbage": _garbage,
    "silence": _silence,
    "out of turn": _out_of_turn,
    "flood": _flood,
    "stall": _takes_an_assignment_and_stalls,
    "short upload": _lying_about(_same, b"short"),
    "other bytes than the digest's": _lying_about(_same, b"\x01" * len(START.buffer)),
    "another base": _lying_about(
        lambda report: replace(report, base_version=bytes(32)), bytes(len(START.buffer))
    ),
    "someone else's assignment": _lying_about(
        lambda report: replace(report, assignment="0" * 32), bytes(len(START.buffer))
    ),
    "absurd examples": _lying_about(
        lambda report: replace(report, examples=1 << 20), b"\x7f" * len(START.buffer)
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_changes_no_byte_of_the_others_adapter(name: str) -> None:
    alone = _finals(_federation(None))
    attacked = _finals(_federation(lambda world: _again(ATTACKS[name], world)))
    assert len(alone) == 1
    assert attacked == alone


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_counts_for_nothing_in_asynchronous_rounds_either(name: str) -> None:
    rules = settings(
        mode=Mode.ASYNCHRONOUS, count=ROUNDS, cohort=HONEST + 1, report_goal=5, deadline_s=1e4
    )
    store = WatchedStore()
    outcome = Outcome(rules, [], store)
    outcome.devices = _run(rules, lambda world: _again(ATTACKS[name], world), store)
    outcome.finals = _finals(outcome.devices)
    hold_in_every_round(outcome)  # every report that counts is one of theirs
    assert all(device.final for device in outcome.devices)


def test_who_takes_too_little_for_a_base_version_is_told_so() -> None:
    base = NamedTensors.from_arrays({"x.A": np.zeros((4, 1000), np.float32)})

    async def scenario() -> None:
        world = World(settings(count=1, cohort=1), base=base)
        await world.start()
        device = RawDevice(await world.dial(), Identity.named("small"))
        await device.ask(replace(default_hello("small"), message_bytes=2048))
        challenge = await device.receive()
        assert isinstance(challenge, Challenge)
        await device.ask(device.signed_join(challenge))
        assigned = await device.ask(CheckIn(FINGERPRINT, 100))
        assert isinstance(assigned, Assignment)
        refusal = await device.ask(Fetch(assigned.payload.digest, 0))
        assert isinstance(refusal, Refusal)
        assert (refusal.code, "takes 2048" in refusal.reason) == (ErrorCode.LIMIT, True)

    simulate(scenario)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_a_poisoned_update_is_rejected_with_a_reason_and_changes_nothing(value: float) -> None:
    def poisoned(update: NamedTensors) -> NamedTensors:
        flat = update.flat().copy()
        flat[3] = value
        return NamedTensors.from_flat(update.specs, flat)

    device = FakeDevice("hostile", training_s=1.0, damage=poisoned)

    async def hostile(world: World) -> None:
        with contextlib.suppress(RefusedError):
            await world.take_part(device)

    assert _finals(_federation(hostile)) == _finals(_federation(None))
    assert len(device.receipts) == ROUNDS
    for receipt in device.receipts:
        assert receipt.status.value == "rejected"
        assert "not finite or over 16" in receipt.reason
