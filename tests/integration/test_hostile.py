"""One device in ten is hostile, over real sockets: the others end as they would alone."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from protocol import codec, limits
from protocol.messages import Assignment, CheckIn, Chunk, Fetch, Message
from protocol.tensors import NamedTensors
from protocol.virtual_time import simulate
from tests.integration.daemon import Daemon, write_federation
from tests.simulation.raw_device import RawDevice
from tests.simulation.world import FINGERPRINT, START, FakeDevice, World, settings

HONEST = 27
HOSTILE = 3
ROUNDS = 2
Attack = Callable[[int, str], Awaitable[None]]


def _devices() -> list[FakeDevice]:
    return [FakeDevice(f"device-{number}", training_s=0.05) for number in range(HONEST)]


def _alone() -> bytes:
    """What the honest devices end with when nobody else is there."""
    devices = _devices()

    async def scenario() -> None:
        world = World(settings(count=ROUNDS, cohort=HONEST, minimum_reports=HONEST, deadline_s=1e5))
        await world.start()
        await asyncio.gather(*(world.take_part(device) for device in devices))

    simulate(scenario)
    (digest,) = {device.final.digest() for device in devices if device.final}
    return digest


async def _open(port: int) -> ClientConnection:
    socket = await connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None)
    current = asyncio.current_task()
    assert current is not None
    current.add_done_callback(lambda _: socket.transport.abort())
    return socket


async def _joined(port: int, name: str) -> ClientConnection:
    socket = await _open(port)
    await RawDevice.over(socket, name).join()
    return socket


async def _assigned(port: int, name: str) -> tuple[RawDevice, ClientConnection, Message]:
    socket = await _open(port)
    device = RawDevice.over(socket, name)
    await device.join()
    return device, socket, await device.ask(CheckIn(FINGERPRINT, 100))


async def _malformed(port: int, name: str) -> None:
    socket = await _open(port)
    await socket.send(random.Random(1).randbytes(4000))
    await socket.wait_closed()


async def _stalled_frame(port: int, name: str) -> None:
    """A frame that announces a megabyte and never ends."""
    socket = await _joined(port, name)
    socket.transport.write(struct.pack("!BBQ", 0x82, 0x80 | 127, 1 << 20) + bytes(4) + b"x" * 100)
    await asyncio.sleep(3600)


async def _stalled_reader(port: int, name: str) -> None:
    """Asks for downloads and does not read them."""
    _, socket, answer = await _assigned(port, name)
    socket.transport.pause_reading()
    if isinstance(answer, Assignment):
        for _ in range(1000):
            socket.transport.write(_frame(codec.encode(Fetch(answer.payload.digest, 0))))
    await asyncio.sleep(3600)


async def _stalled_upload(port: int, name: str) -> None:
    device, _, answer = await _assigned(port, name)
    update = NamedTensors.from_flat(START.specs, np.zeros_like(START.flat()))
    if isinstance(answer, Assignment):
        await device.send(device.report(answer, update.payload(), 100))
    await asyncio.sleep(3600)


async def _flood(port: int, name: str) -> None:
    socket = await _joined(port, name)
    data = _frame(codec.encode(CheckIn(FINGERPRINT, 100)))
    for _ in range(200):
        socket.transport.write(data * 500)
        await asyncio.sleep(0)
    await socket.wait_closed()


async def _flood_of_connections(port: int, name: str) -> None:
    sockets = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
    for _, writer in sockets:
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")  # and never the end of it
    try:
        await asyncio.sleep(3600)
    finally:
        for _, writer in sockets:
            writer.close()


async def _oversized(port: int, name: str) -> None:
    socket = await _joined(port, name)
    await socket.send(bytes(limits.MESSAGE_BYTES_MAX + 1))
    await socket.wait_closed()


async def _lying(port: int, name: str) -> None:
    """Promises one update and sends another."""
    device, socket, answer = await _assigned(port, name)
    update = NamedTensors.from_flat(START.specs, np.ones_like(START.flat()))
    if isinstance(answer, Assignment):
        await device.ask(device.report(answer, update.payload(), 100))
        await device.send(Chunk(0, True, bytes(len(update.buffer))))
    await socket.wait_closed()


def _frame(data: bytes) -> bytes:
    """A masked frame of a short message (the mask is zero)."""
    size = bytes([0x80 | len(data)]) if len(data) < 126 else struct.pack("!BH", 0xFE, len(data))
    return b"\x82" + size + bytes(4) + data


GROUPS = {
    "broken": (_malformed, _oversized, _lying),
    "stalled": (_stalled_frame, _stalled_reader, _stalled_upload),
    "flooding": (_flood, _flood, _flood_of_connections),
}


async def _again_and_again(attack: Attack, port: int, name: str, seen: set[str]) -> None:
    while True:
        with contextlib.suppress(WebSocketException, OSError, EOFError):
            seen.add(attack.__name__)
            await attack(port, name)
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("group", GROUPS)
def test_the_others_end_with_the_same_bytes(tmp_path: Path, group: str) -> None:
    path = write_federation(
        tmp_path,
        count=ROUNDS,
        cohort=HONEST + HOSTILE,
        report_goal=HONEST,
        minimum_reports=HONEST,
    )
    devices, seen = _devices(), set[str]()

    async def scenario() -> None:
        daemon = Daemon(path)
        await daemon.start()
        hostile = [
            asyncio.create_task(_again_and_again(attack, daemon.port, f"hostile-{n}", seen))
            for n, attack in enumerate(GROUPS[group])
        ]
        try:
            await asyncio.gather(*(daemon.session(device).run() for device in devices))
        finally:
            for task in hostile:
                task.cancel()
            await asyncio.gather(*hostile, return_exceptions=True)
            await daemon.kill()

    asyncio.run(scenario())
    assert seen == {attack.__name__ for attack in GROUPS[group]}
    assert {device.final.digest() for device in devices if device.final} == {_alone()}
    assert all(set(device.trained) == set(range(1, ROUNDS + 1)) for device in devices)
