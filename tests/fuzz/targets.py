"""What is fuzzed: bytes in, and nothing but the faults that are meant for them out.

    decoder      any bytes as a message
    coordinator  any bytes, and honest steps between them, as what a device sends in a session
    device       likewise as what a coordinator sends

An input of the last two is a script of steps with a byte between them that no message has, as
msgpack leaves it unused (but for the bytes of tensors). A step of one byte below 0x20 is an honest
one, any other is sent as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from coordinator.enrolment import Gate
from coordinator.federations import Federations
from coordinator.roster import Roster
from coordinator.service import FederationService
from coordinator.session import DeviceSession
from coordinator.store.memory import MemoryStore
from edge_client.errors import RefusedError, UnreachableError
from edge_client.identity import Identity
from edge_client.session import FinishedReport, Offer, Session
from protocol import codec
from protocol.connection import default_hello
from protocol.errors import RemoteProtocolError
from protocol.fake_link import FakeLink, fake_links
from protocol.federation import FederationSettings
from protocol.link import Link, LinkClosedError
from protocol.messages import (
    Assignment,
    Challenge,
    CheckIn,
    Chunk,
    Fetch,
    Finished,
    Goodbye,
    Join,
    Joined,
    Message,
    Receipt,
    ReceiptStatus,
    Refusal,
    Report,
    Resume,
    RetryWindow,
)
from protocol.signing import UNSIGNED, join_statement, report_statement
from protocol.tensors import NamedTensors
from protocol.virtual_time import at_once, simulate
from tests.protocol.samples import SAMPLES
from tests.simulation.world import FINGERPRINT, START, settings

RULES = settings(count=2, cohort=1, deadline_s=100.0)
IDENTITY = Identity.named("fuzzed")
UPDATE = NamedTensors.from_flat(START.specs, np.full_like(START.flat(), 0.01))
BETWEEN = b"\xc1"
BEFORE_RAW = 0x20
PAUSE_S = 0.01


def decoder(data: bytes) -> None:
    """Any bytes are a message that comes back the same, or a RemoteProtocolError."""
    try:
        message = codec.decode(data)
    except RemoteProtocolError:
        return
    assert codec.decode(codec.encode(message)) == message


def coordinator(data: bytes) -> None:
    """Whatever a device sends: its session ends, and the federation is as good as before."""
    simulate(partial(_against_coordinator, data))


def device(data: bytes) -> None:
    """Whatever a coordinator sends: the device gives up with an error that says so, or is done."""
    simulate(partial(_against_device, data))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "decoder": decoder,
    "coordinator": coordinator,
    "device": device,
}


def steps(data: bytes) -> list[int | bytes]:
    """The steps of a script."""
    return [
        step[0] if len(step) == 1 and step[0] < BEFORE_RAW else step for step in data.split(BETWEEN)
    ]


def script(*said: int | bytes | Message) -> bytes:
    """The input that has these steps."""
    return BETWEEN.join(map(_step, said))


def _step(said: int | bytes | Message) -> bytes:
    match said:
        case int():
            return bytes([said])
        case bytes():
            return said
        case _:
            return codec.encode(said)


async def _against_coordinator(data: bytes) -> None:
    clock, store = asyncio.get_running_loop().time, MemoryStore()
    service = FederationService(
        RULES,
        START,
        store,
        rng=random.Random(1),
        run_blocking=at_once,
        read_aside=lambda read: at_once(partial(read, store)),
        clock=clock,
    )
    gate = Gate(store.devices, is_open=True, run_blocking=at_once, clock=clock)
    await service.open()
    ours, theirs = fake_links(random.Random(1))
    session = asyncio.create_task(
        DeviceSession(theirs, Federations([service]), Roster(), gate).run()
    )
    try:
        for step in steps(data):
            await ours.send(step if isinstance(step, bytes) else _honest_device(step, ours))
            await asyncio.sleep(PAUSE_S)
        await asyncio.sleep(PAUSE_S)
    except LinkClosedError:
        pass  # the coordinator has hung up
    await ours.close()
    await session
    service.close()
    if service.failure.done():
        service.failure.result()
    assert all(outcome.reports <= 1 for outcome in store.history("sim"))


def _heard(link: FakeLink, kind: type[Message]) -> Message:
    """The last message of this kind that came, or a made-up one."""
    for data in reversed(link.other.sent):
        message = codec.decode(data)
        if type(message) is kind:
            return message
    return SAMPLES[kind]


def _join(link: FakeLink) -> Message:
    challenge = _heard(link, Challenge)
    assert isinstance(challenge, Challenge)
    join = Join("sim", IDENTITY.key, b"", "", UNSIGNED)
    return replace(join, signature=IDENTITY.sign(join_statement(join, challenge.nonce, 2)))


def _assigned(link: FakeLink) -> Assignment:
    assignment = _heard(link, Assignment)
    assert isinstance(assignment, Assignment)
    return assignment


def _report(link: FakeLink) -> Message:
    asked = _assigned(link)
    report = Report(
        asked.assignment, asked.round, asked.base_version, 10, (), UPDATE.payload(), UNSIGNED
    )
    statement = report_statement(report, "sim", IDENTITY.device)
    return replace(report, signature=IDENTITY.sign(statement))


_HALF = len(START.buffer) // 2
_FROM_DEVICE: tuple[Callable[[FakeLink], Message], ...] = (
    lambda _: default_hello("fuzz"),
    _join,
    lambda _: CheckIn(FINGERPRINT, 10),
    lambda link: Fetch(_assigned(link).payload.digest, 0),
    _report,
    lambda _: Chunk(0, True, bytes(UPDATE.buffer)),
    lambda _: Chunk(0, False, bytes(UPDATE.buffer[:_HALF])),
    lambda _: Chunk(_HALF, True, bytes(UPDATE.buffer[_HALF:])),
    lambda _: Goodbye(""),
)


def _honest_device(step: int, link: FakeLink) -> bytes:
    return codec.encode(_FROM_DEVICE[step % len(_FROM_DEVICE)](link))


class _Worker:
    """A device whose training is nothing, whatever it is sent."""

    def __init__(self) -> None:
        self._report: FinishedReport | None = None

    async def prepare(self, settings: FederationSettings) -> None:
        pass

    def offer(self) -> Offer:
        return Offer(FINGERPRINT, 10)

    def held(self, digest: bytes) -> NamedTensors | None:
        return None

    def unsent(self) -> FinishedReport | None:
        return self._report

    async def train(self, assignment: Assignment, base: NamedTensors) -> FinishedReport:
        self._report = FinishedReport(
            assignment.assignment, assignment.round, assignment.base_version, 10, (), UPDATE
        )
        return self._report

    async def settled(self, receipt: Receipt) -> None:
        self._report = None

    async def finish(self, base: NamedTensors, rounds: int) -> None:
        pass


async def _against_device(data: bytes) -> None:
    ours, theirs = fake_links(random.Random(1))
    dialled = False

    async def dial() -> Link:
        nonlocal dialled
        if dialled:
            raise LinkClosedError("once is enough")
        dialled = True
        return theirs

    session = Session(
        dial,
        _Worker(),
        federation="sim",
        identity=IDENTITY,
        rng=random.Random(1),
        patience_s=1e-9,
        first_contact_patience_s=1e-9,
    )
    running = asyncio.create_task(session.run())
    try:
        for step in steps(data):
            await ours.send(step if isinstance(step, bytes) else _honest_coordinator(step))
            await asyncio.sleep(PAUSE_S)
    except LinkClosedError:
        pass  # the device has hung up
    await ours.close()
    with contextlib.suppress(RefusedError, UnreachableError):
        await running


_FROM_COORDINATOR: tuple[Message, ...] = (
    default_hello("fuzz"),
    Challenge(bytes(32)),
    Joined(RULES),
    Assignment("a1", 1, START.digest(), 60.0, START.payload()),
    Chunk(0, True, bytes(START.buffer)),
    Chunk(0, False, bytes(START.buffer[:_HALF])),
    Chunk(_HALF, True, bytes(START.buffer[_HALF:])),
    Resume(0),
    Receipt("a1", ReceiptStatus.ACCEPTED, ""),
    RetryWindow(1.0, 1.0, "later"),
    Finished(2, START.digest(), START.payload()),
    SAMPLES[Refusal],
    Goodbye(""),
)


def _honest_coordinator(step: int) -> bytes:
    return codec.encode(_FROM_COORDINATOR[step % len(_FROM_COORDINATOR)])
