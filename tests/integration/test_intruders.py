"""Tried from outside, over real sockets and TLS: who may not take part reaches no round.

Every refusal is told to the device, counted and logged with its reason.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator import cli
from coordinator.store.base import Outcome
from coordinator.store.devices import DeviceStatus
from coordinator.store.sql import SqlStore
from edge_client.identity import Identity
from protocol import codec
from protocol.connection import default_hello
from protocol.errors import ErrorCode
from protocol.link import Link, LinkClosedError
from protocol.messages import (
    Assignment,
    CheckIn,
    Chunk,
    Joined,
    Message,
    Receipt,
    ReceiptStatus,
    Refusal,
    Report,
    Resume,
)
from protocol.signing import UNSIGNED
from protocol.tensors import NamedTensors
from tests.integration.outside import BAD, GOOD, Outside, opened
from tests.simulation.raw_device import RawDevice
from tests.simulation.world import FINGERPRINT, START

UPDATE = NamedTensors.from_flat(START.specs, np.full_like(START.flat(), 0.01))


# --- joining ----------------------------------------------------------------------------------

Attack = Callable[[Outside], Awaitable[Message]]


async def _unknown(outside: Outside) -> Message:
    return await (await outside.dial(BAD)).join()


async def _unknown_token(outside: Outside) -> Message:
    return await (await outside.dial(BAD)).join("guessed")


async def _expired_token(outside: Outside) -> Message:
    outside.devices.add_tokens(["late"], time.time() - 1.0)
    return await (await outside.dial(BAD)).join("late")


async def _used_token(outside: Outside) -> Message:
    outside.devices.add_tokens(["once"], time.time() + 60.0)
    first = await outside.dial(Identity.named("first"))
    assert isinstance(await first.join("once"), Joined)
    await first.link.close()
    return await (await outside.dial(BAD)).join("once")


async def _revoked(outside: Outside) -> Message:
    outside.approve(BAD, DeviceStatus.REVOKED)
    return await (await outside.dial(BAD)).join()


async def _revoked_with_a_token(outside: Outside) -> Message:
    outside.approve(BAD, DeviceStatus.REVOKED)
    outside.devices.add_tokens(["fresh"], time.time() + 60.0)
    return await (await outside.dial(BAD)).join("fresh")


async def _quarantined(outside: Outside) -> Message:
    outside.approve(BAD, DeviceStatus.QUARANTINED)
    return await (await outside.dial(BAD)).join()


async def _shows_the_key_of_another(outside: Outside) -> Message:
    device = await outside.dial(BAD)
    join = device.signed_join(await device.challenge())
    return await device.ask(replace(join, key=GOOD.key))


async def _replays_the_join_of_another(outside: Outside) -> Message:
    overheard = await outside.dial(GOOD)
    join = overheard.signed_join(await overheard.challenge())
    assert isinstance(await overheard.ask(join), Joined)
    await overheard.link.close()
    device = await outside.dial(BAD)
    await device.challenge()
    return await device.ask(join)


async def _passes_on_a_proof_given_elsewhere(outside: Outside) -> Message:
    """A device has connected to a host in between, and sees that host's certificate."""
    device = await outside.dial(GOOD)
    device.link.channel = bytes(32)  # type: ignore[misc]
    return await device.ask(device.signed_join(await device.challenge()))


async def _without_a_channel(outside: Outside) -> Message:
    device = await outside.dial(GOOD)
    device.link.channel = b""  # type: ignore[misc]
    return await device.ask(device.signed_join(await device.challenge()))


async def _changes_the_federation_after_signing(outside: Outside) -> Message:
    device = await outside.dial(GOOD)
    join = device.signed_join(await device.challenge())
    return await device.ask(replace(join, federation=""))


async def _another_federation(outside: Outside) -> Message:
    return await (await outside.dial(GOOD)).join(federation="other")


async def _does_not_join(outside: Outside) -> Message:
    device = await outside.dial(GOOD)
    await device.challenge()
    await device.force(CheckIn(FINGERPRINT, 10))
    return await device.receive()


async def _does_not_greet(outside: Outside) -> Message:
    device = await outside.dial(GOOD)
    await device.force(CheckIn(FINGERPRINT, 10))
    return codec.decode(await device.link.receive())


async def _speaks_the_version_before(outside: Outside) -> Message:
    device = await outside.dial(GOOD)
    await device.force(replace(default_hello("old"), versions=(1,)))
    return codec.decode(await device.link.receive())


JOINING: dict[Attack, tuple[ErrorCode, str]] = {
    _unknown: (ErrorCode.PENDING, "waits for the operator's approval"),
    _unknown_token: (ErrorCode.TOKEN, "the enrolment token is not known here"),
    _expired_token: (ErrorCode.TOKEN, "the enrolment token has expired"),
    _used_token: (ErrorCode.TOKEN, "the enrolment token has been used already"),
    _revoked: (ErrorCode.REVOKED, "is revoked: lost"),
    _revoked_with_a_token: (ErrorCode.REVOKED, "is revoked: lost"),
    _quarantined: (ErrorCode.QUARANTINED, "is quarantined: lost"),
    _shows_the_key_of_another: (ErrorCode.SIGNATURE, "not signed by the key that was shown"),
    _replays_the_join_of_another: (ErrorCode.SIGNATURE, "not signed by the key that was shown"),
    _passes_on_a_proof_given_elsewhere: (ErrorCode.SIGNATURE, "someone is in between"),
    _without_a_channel: (ErrorCode.SIGNATURE, "someone is in between"),
    _changes_the_federation_after_signing: (ErrorCode.SIGNATURE, "not signed by the key"),
    _another_federation: (ErrorCode.UNKNOWN_FEDERATION, "no federation 'other' here"),
    _does_not_join: (ErrorCode.UNEXPECTED_MESSAGE, "CheckIn from DEVICE in OPEN"),
    _does_not_greet: (ErrorCode.UNEXPECTED_MESSAGE, "CheckIn from DEVICE in NEW"),
    _speaks_the_version_before: (ErrorCode.VERSION, "coordinator speaks 3, device speaks 1"),
}


@pytest.mark.parametrize("attack", JOINING, ids=lambda attack: attack.__name__.strip("_"))
def test_who_may_not_take_part_reaches_no_round(
    tmp_path: Path, reached: list[str], caplog: pytest.LogCaptureFixture, attack: Attack
) -> None:
    code, reason = JOINING[attack]

    async def scenario() -> None:
        async with opened(tmp_path) as outside:
            outside.approve(GOOD)
            answer = await attack(outside)
            assert isinstance(answer, Refusal), answer
            assert answer.code is code
            assert reason in answer.reason
            assert outside.refusals() == {code.value: 1.0}

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert BAD.device not in reached
    honest = {Identity.named("first").device, GOOD.device}
    assert set(reached) <= (honest if "replays" in attack.__name__ else honest - {GOOD.device})
    assert f"{code.value}: " in caplog.text
    assert reason in caplog.text


# --- reporting --------------------------------------------------------------------------------


async def _assigned(outside: Outside, identity: Identity) -> tuple[RawDevice, Report]:
    """A device that has joined and been asked, and the honest report it could send."""
    device = await outside.dial(identity)
    assert isinstance(await device.join(), Joined)
    assignment = await device.ask(CheckIn(FINGERPRINT, 10))
    assert isinstance(assignment, Assignment)
    report = Report(
        assignment.assignment,
        assignment.round,
        assignment.base_version,
        10,
        (),
        UPDATE.payload(),
        UNSIGNED,
    )
    return device, device.signed(report)


def _changed(**fields: object) -> Callable[[Report], Report]:
    return lambda report: replace(report, **fields)  # type: ignore[arg-type]


OTHER_UPDATE = NamedTensors.from_flat(START.specs, UPDATE.flat() * 2).payload()
FORGERIES = {
    "unsigned": _changed(signature=UNSIGNED),
    "another update": _changed(payload=OTHER_UPDATE),
    "another round": _changed(round=2),
    "another base": _changed(base_version=bytes(32)),
    "another assignment": _changed(assignment="0" * 32),
    "more examples": _changed(examples=11),
    "signed by another device": lambda report: RawDevice(_NO_LINK, BAD).signed(report),
    "signed for another federation": lambda report: RawDevice(_NO_LINK, GOOD).signed(
        report, "other"
    ),
}


class _NoLink:
    channel = b""


_NO_LINK: Link = _NoLink()  # type: ignore[assignment]


@pytest.mark.parametrize("name", FORGERIES)
def test_a_report_that_is_not_signed_as_it_stands_is_refused(
    tmp_path: Path, reached: list[str], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as outside:
            outside.approve(GOOD)
            device, report = await _assigned(outside, GOOD)
            before = len(reached)
            answer = await device.ask(FORGERIES[name](report))
            assert isinstance(answer, Refusal)
            assert answer.code is ErrorCode.SIGNATURE
            assert reached[before:] == []
            assert outside.refusals() == {"signature": 1.0}

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert f"refused {GOOD.device}: signature: the report's signature" in caplog.text


async def _send(device: RawDevice, report: Report) -> Message:
    answer = await device.ask(report)
    if not isinstance(answer, Resume):
        return answer
    return await device.ask(Chunk(0, True, bytes(UPDATE.buffer)))


def test_a_report_counts_once_however_often_and_by_whomever_it_is_sent(
    tmp_path: Path, reached: list[str]
) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as outside:
            outside.approve(GOOD)
            outside.approve(BAD)
            device, report = await _assigned(outside, GOOD)
            receipt = await _send(device, report)
            assert isinstance(receipt, Receipt)
            assert receipt.status is ReceiptStatus.ACCEPTED
            again = await _send(device, report)
            assert isinstance(again, Receipt)
            assert again.status is ReceiptStatus.DUPLICATE
            await device.link.close()
            # Round 2, whose only member is another device: it has recorded the report.
            thief, _ = await _assigned(outside, BAD)
            moved = await thief.ask(report)
            assert isinstance(moved, Refusal)
            assert moved.code is ErrorCode.SIGNATURE
            history = outside.server._store.history("sim")
            assert [outcome.reports for outcome in history] == [1]

    asyncio.run(scenario())
    assert set(reached) == {GOOD.device, BAD.device}


# --- in the middle of a session ---------------------------------------------------------------


async def _training(outside: Outside, device: RawDevice, report: Report) -> None:
    """It has its assignment and says nothing."""


async def _uploading(outside: Outside, device: RawDevice, report: Report) -> None:
    assert isinstance(await device.ask(report), Resume)
    await device.send(Chunk(0, False, bytes(UPDATE.buffer[:8])))


@pytest.mark.parametrize("then", [_training, _uploading], ids=["training", "uploading"])
def test_revoking_a_connected_device_ends_its_session(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, then: Callable[..., Awaitable[None]]
) -> None:
    async def scenario() -> float:
        async with opened(tmp_path) as outside:
            outside.approve(GOOD)
            device, report = await _assigned(outside, GOOD)
            await then(outside, device, report)
            store = ["--store", f"sqlite:///{tmp_path}/pf2lora.sqlite"]
            revoke = ["devices", "revoke", *store, GOOD.device[:8], "--reason", "lost"]
            assert await asyncio.to_thread(cli.main, revoke) == 0
            asked = time.monotonic()
            answer = await device.receive()
            took_s = time.monotonic() - asked
            assert isinstance(answer, Refusal)
            assert answer.code is ErrorCode.REVOKED
            with pytest.raises(LinkClosedError):
                await device.link.receive()
            again = await (await outside.dial(GOOD)).join()
            assert isinstance(again, Refusal)
            assert again.code is ErrorCode.REVOKED
            return took_s

    assert asyncio.run(scenario()) < 2.0  # polled every second
    store = SqlStore(f"sqlite:///{tmp_path}/pf2lora.sqlite")
    (outcome,) = store.history("sim")
    store.close()
    assert outcome.outcome is Outcome.ABANDONED  # long before its deadline: nobody waits for it
    gc.collect()  # asyncio complains of exceptions that nobody has looked at when tasks go
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
