"""Tried from outside, over real sockets and TLS: who may not take part reaches no round.

Every refusal is told to the device, counted and logged with its reason.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from coordinator import certificates, cli, config
from coordinator.certificates import Authority
from coordinator.server import CoordinatorServer
from coordinator.service import FederationService
from coordinator.store.base import Outcome
from coordinator.store.devices import DeviceRecord, DeviceStatus, DeviceStore
from coordinator.store.sql import SqlStore
from edge_client.errors import UnreachableError
from edge_client.identity import Identity
from edge_client.session import Session
from edge_client.tls import TlsFiles
from edge_client.transport import websocket_dial
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
from tests.integration.daemon import write_federation
from tests.simulation.raw_device import RawDevice
from tests.simulation.world import FINGERPRINT, START, FakeDevice

SERVER = """
certificate = "server.pem"
key = "server.key"
"""
UPDATE = NamedTensors.from_flat(START.specs, np.full_like(START.flat(), 0.01))
GOOD, BAD = Identity.named("good"), Identity.named("bad")


def _written(folder: Path) -> Path:
    Authority(folder).issue_server(["127.0.0.1"], 1.0)
    return write_federation(folder, server=SERVER, count=2, cohort=1)


@dataclass
class Outside:
    """A running coordinator as it is seen from outside, and what its store says of devices."""

    folder: Path
    server: CoordinatorServer
    devices: DeviceStore

    async def dial(self, identity: Identity) -> RawDevice:
        address = f"wss://127.0.0.1:{self.server.port}"
        link = await websocket_dial(address, TlsFiles(self.folder / "ca.pem"))()
        return RawDevice(link, identity)

    def refusals(self) -> dict[str, float]:
        """As they are counted for those who watch."""
        text = self.server.watch._metrics.render().decode()
        found = re.findall(r'pf2lora_refusals_total\{code="(\w+)"\} (\S+)', text)
        return {code: float(count) for code, count in found}

    def approve(self, identity: Identity, status: DeviceStatus = DeviceStatus.APPROVED) -> None:
        record = DeviceRecord(identity.device, identity.key, status, time.time(), reason="lost")
        self.devices.add(record)


@asynccontextmanager
async def _outside(folder: Path, **flags: str) -> AsyncIterator[Outside]:
    path = _written(folder)
    keys = {f"server.{key}": value for key, value in {"port": "0", **flags}.items()}
    async with CoordinatorServer(config.load(path, keys, {})) as server:
        yield Outside(folder, server, server._store.devices)


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices of which a federation has heard anything, in order."""
    heard: list[str] = []
    for name in ("joined", "check_in", "offer", "take"):
        original = getattr(FederationService, name)

        def listen(self: object, device: str, *rest: object, _do: object = original) -> object:
            heard.append(device)
            return _do(self, device, *rest)  # type: ignore[operator]

        monkeypatch.setattr(FederationService, name, listen)
    return heard


# --- joining ----------------------------------------------------------------------------------

Attack = Callable[[Outside], Awaitable[Message]]


async def _unknown(outside: Outside) -> Message:
    return await (await outside.dial(BAD)).join()


async def _unknown_token(outside: Outside) -> Message:
    return await (await outside.dial(BAD)).join("guessed")


async def _expired_token(outside: Outside) -> Message:
    outside.devices.add_token("late", time.time() - 1.0)
    return await (await outside.dial(BAD)).join("late")


async def _used_token(outside: Outside) -> Message:
    outside.devices.add_token("once", time.time() + 60.0)
    first = await outside.dial(Identity.named("first"))
    assert isinstance(await first.join("once"), Joined)
    await first.link.close()
    return await (await outside.dial(BAD)).join("once")


async def _revoked(outside: Outside) -> Message:
    outside.approve(BAD, DeviceStatus.REVOKED)
    return await (await outside.dial(BAD)).join()


async def _revoked_with_a_token(outside: Outside) -> Message:
    outside.approve(BAD, DeviceStatus.REVOKED)
    outside.devices.add_token("fresh", time.time() + 60.0)
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
    _speaks_the_version_before: (ErrorCode.VERSION, "coordinator speaks 2, device speaks 1"),
}


@pytest.mark.parametrize("attack", JOINING, ids=lambda attack: attack.__name__.strip("_"))
def test_who_may_not_take_part_reaches_no_round(
    tmp_path: Path, reached: list[str], caplog: pytest.LogCaptureFixture, attack: Attack
) -> None:
    code, reason = JOINING[attack]

    async def scenario() -> None:
        async with _outside(tmp_path) as outside:
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
        async with _outside(tmp_path) as outside:
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
        async with _outside(tmp_path) as outside:
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
        async with _outside(tmp_path) as outside:
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


# --- TLS --------------------------------------------------------------------------------------


@asynccontextmanager
async def _mutual(folder: Path) -> AsyncIterator[Outside]:
    Authority(folder / "clients").issue_client("ward-3", 1.0)
    async with _outside(folder, client_ca="clients/ca.pem") as outside:
        outside.approve(GOOD)
        yield outside


def test_over_mutual_tls_a_device_with_a_certificate_joins(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with _mutual(tmp_path) as outside:
            own = (tmp_path / f"clients/client-ward-3.{end}" for end in ("pem", "key"))
            files = TlsFiles(tmp_path / "ca.pem", *own)
            link = await websocket_dial(f"wss://127.0.0.1:{outside.server.port}", files)()
            assert isinstance(await RawDevice(link, GOOD).join(), Joined)

    asyncio.run(scenario())


@pytest.mark.parametrize("which", ["none", "expired", "of another authority"])
def test_over_mutual_tls_another_certificate_gets_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: list[str], which: str
) -> None:
    async def scenario() -> None:
        async with _mutual(tmp_path) as outside:
            folder = {"expired": "clients", "of another authority": "others"}.get(which)
            files = TlsFiles(tmp_path / "ca.pem")
            if folder:
                monkeypatch.setattr(certificates, "BACKDATED", timedelta(days=3))
                Authority(tmp_path / folder).issue_client("x", -1.0 if which == "expired" else 1.0)
                own = (tmp_path / folder / f"client-x.{end}" for end in ("pem", "key"))
                files = TlsFiles(tmp_path / "ca.pem", *own)
            with pytest.raises(LinkClosedError, match="does it want a client_certificate"):
                await websocket_dial(f"wss://127.0.0.1:{outside.server.port}", files)()

    asyncio.run(scenario())
    assert reached == []


def _certify(folder: Path, host: str, days: float) -> None:
    for file in ("ca.pem", "ca.key", "server.pem", "server.key"):
        (folder / file).unlink()
    Authority(folder).issue_server([host], days)


@pytest.mark.parametrize(
    ("host", "days", "scheme", "ca_file", "problem"),
    [
        ("127.0.0.1", 1.0, "wss", None, "an authority that this device does not know; give its ca"),
        ("127.0.0.1", 1.0, "wss", "other/ca.pem", "an authority that this device does not know"),
        ("127.0.0.1", -1.0, "wss", "ca.pem", "the coordinator's certificate has expired"),
        ("10.9.8.7", 1.0, "wss", "ca.pem", "is for another host: IP address mismatch.*127.0.0.1"),
        ("127.0.0.1", 1.0, "ws", None, r"hung up without an answer; .* want wss://"),
        ("", 1.0, "wss", "ca.pem", r"no TLS could be had there; .* want ws://"),
    ],
)
def test_a_device_that_cannot_trust_its_coordinator_says_why_and_sends_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reached: list[str],
    host: str,
    days: float,
    scheme: str,
    ca_file: str | None,
    problem: str,
) -> None:
    monkeypatch.setattr(certificates, "BACKDATED", timedelta(days=3))
    Authority(tmp_path / "other")
    path = _written(tmp_path)
    flags = {"server.port": "0"}
    if host:
        _certify(tmp_path, host, days)
    else:
        flags |= {"server.certificate": "", "server.key": ""}

    async def scenario() -> None:
        async with CoordinatorServer(config.load(path, flags, {})) as server:
            files = TlsFiles(tmp_path / ca_file if ca_file else None)
            session = Session(
                websocket_dial(f"{scheme}://127.0.0.1:{server.port}", files),
                FakeDevice("good"),
                federation="sim",
                identity=GOOD,
                rng=random.Random(1),
                first_contact_patience_s=1e-9,
            )
            await session.run()

    with pytest.raises(UnreachableError, match=problem):
        asyncio.run(scenario())
    assert reached == []


def test_an_untrusted_certificate_is_not_tried_again_at_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with _outside(tmp_path) as outside:
            await Session(
                websocket_dial(f"wss://127.0.0.1:{outside.server.port}"),
                FakeDevice("good"),
                federation="sim",
                identity=GOOD,
                rng=random.Random(1),
                first_contact_patience_s=3600.0,
            ).run()

    with pytest.raises(UnreachableError, match="in 1 attempt:"):
        asyncio.run(scenario())
