"""A full coordinator says when to come back, and looks after itself."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
from pathlib import Path

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from coordinator import server
from coordinator.config import load
from coordinator.refusals import LINES_MAX
from coordinator.server import CoordinatorServer
from edge_client.session import Session
from edge_client.transport import websocket_dial
from protocol import codec
from protocol.connection import default_hello
from protocol.errors import ErrorCode
from protocol.messages import (
    Assignment,
    CheckIn,
    Chunk,
    Hello,
    Message,
    Refusal,
    Resume,
)
from protocol.tensors import NamedTensors
from tests.integration.daemon import write_federation
from tests.simulation.raw_device import RawDevice
from tests.simulation.world import FINGERPRINT, START, FakeDevice


def _configured(folder: Path, settings: str) -> CoordinatorServer:
    path = write_federation(folder, count=1, cohort=1, server="port = 0\n" + settings)
    return CoordinatorServer(load(path, {}, {}))


async def _first_word(port: int, *said: Message) -> Message:
    async with connect(f"ws://127.0.0.1:{port}") as socket:
        answer: Message = default_hello("")
        for message in said:
            await socket.send(codec.encode(message))
            answer = codec.decode(await socket.recv(decode=False))
        return answer


async def _joined(port: int, name: str) -> Message:
    async with connect(f"ws://127.0.0.1:{port}") as socket:
        return await RawDevice.over(socket, name).join()


def test_over_the_cap_a_device_is_told_when_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "TURNED_AWAY_RETRY_S", 0.2)
    monkeypatch.setattr(server, "TURNED_AWAY_MAX", 1)
    device = FakeDevice("patient", training_s=0.0)

    async def scenario() -> None:
        async with _configured(tmp_path, "connections_max = 1") as running:
            address = f"ws://127.0.0.1:{running.port}"
            async with connect(address):
                refusal = await _first_word(running.port, default_hello("test"))
                assert isinstance(refusal, Refusal)
                assert (refusal.code, refusal.retry_after_s) == (ErrorCode.BUSY, 0.2)
                # One more than can be refused at a time is dropped at once.
                async with connect(address):
                    with pytest.raises((OSError, EOFError, WebSocketException)):
                        await connect(address)
                session = Session(
                    websocket_dial(address),
                    device,
                    federation="sim",
                    identity=device.identity,
                    rng=random.Random(1),
                    first_contact_patience_s=0.01,  # to be told to wait is to be answered
                )
                running_session = asyncio.create_task(session.run())
                while not session.traffic.sent_bytes:  # noqa: ASYNC110 - it is on its way
                    await asyncio.sleep(0.01)
            await running_session

    asyncio.run(scenario())
    assert device.final is not None


def test_a_crowd_that_is_turned_away_does_not_flood_the_log_and_is_counted_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> bytes:
        async with _configured(tmp_path, "connections_max = 1") as running:
            async with connect(f"ws://127.0.0.1:{running.port}"):
                for _ in range(30):
                    await _first_word(running.port, default_hello("test"))
            return running.watch._metrics.render()

    assert b'pf2lora_refusals_total{code="busy"} 30.0' in asyncio.run(scenario())
    lines = [line for line in caplog.messages if "refused" in line]
    assert len(lines) == LINES_MAX + 1
    assert lines[0] == "refused a device: busy: too many connections"
    assert lines[-1] == f"refused {30 - LINES_MAX} more within 60 s: busy"


def test_an_address_or_a_device_that_comes_too_often_is_told_so(tmp_path: Path) -> None:
    rates = "[server.rates]\nconnections_per_address = {}\nconnections_per_device = {}\n"

    async def scenario() -> None:
        hello = default_hello("test")
        (tmp_path / "a").mkdir()
        async with _configured(tmp_path / "a", rates.format(0.02, 0)) as running:
            answers = [await _first_word(running.port, hello) for _ in range(3)]
        assert [type(answer) for answer in answers] == [Hello, Hello, Refusal]
        assert isinstance(answers[2], Refusal)
        assert "address" in answers[2].reason
        assert 40.0 <= answers[2].retry_after_s <= 50.0
        (tmp_path / "b").mkdir()
        async with _configured(tmp_path / "b", rates.format(0, 0.02)) as running:
            answers = [await _joined(running.port, "often") for _ in range(3)]
            other = await _joined(running.port, "another")
        assert [isinstance(answer, Refusal) for answer in answers] == [False, False, True]
        assert not isinstance(other, Refusal)

    asyncio.run(scenario())


def test_no_more_connections_than_file_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1000))
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    left = 1000 - server.TURNED_AWAY_MAX - server.DESCRIPTORS_SPARE
    assert server._affordable(10_000, 0) == left
    assert server._affordable(10_000, 512) == left - 512
    assert server._affordable(100, 0) == 100
    assert set_to == [(1000, 1000)] * 3


@pytest.mark.parametrize(("soft", "raised_to"), [(256, server.OPEN_MAX), (50_000, 50_000)])
def test_without_a_hard_limit_the_soft_one_is_raised(
    monkeypatch: pytest.MonkeyPatch, soft: int, raised_to: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    spare = server.TURNED_AWAY_MAX + server.DESCRIPTORS_SPARE
    assert server._affordable(100_000, 0) == raised_to - spare
    assert set_to == [(raised_to, resource.RLIM_INFINITY)]


def test_a_connection_that_says_nothing_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "OPEN_TIMEOUT_S", 0.1)
    monkeypatch.setattr("coordinator.session.GREETING_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async with _configured(tmp_path, "") as running:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            await reader.read()  # ends
            writer.close()
            answer = await _silent_after_opening(running.port)
            assert isinstance(answer, Refusal)
            assert answer.code is ErrorCode.TIMEOUT

    asyncio.run(scenario())


async def _silent_after_opening(port: int) -> Message:
    async with connect(f"ws://127.0.0.1:{port}") as socket:
        return codec.decode(await socket.recv(decode=False))


def test_a_draining_daemon_puts_what_has_come_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload that stands still when the daemon stops is gone on with by the next."""
    monkeypatch.setattr(server, "DRAIN_S", 0.1)
    monkeypatch.setattr(server, "CLOSE_TIMEOUT_S", 0.1)
    update = NamedTensors.from_flat(START.specs, np.zeros_like(START.flat()))

    async def scenario() -> int:
        async with contextlib.AsyncExitStack() as stack:
            running = await stack.enter_async_context(_configured(tmp_path, ""))
            socket = await stack.enter_async_context(connect(f"ws://127.0.0.1:{running.port}"))
            assignment = await _offering(socket, update)
            assert codec.decode(await socket.recv(decode=False)) == Resume(0)
            await socket.send(codec.encode(Chunk(0, False, bytes(100))))
            await running.__aexit__()
            stack.pop_all()
            await socket.close()
        async with (
            _configured(tmp_path, "") as running,
            connect(f"ws://127.0.0.1:{running.port}") as socket,
        ):
            assert await _offering(socket, update) == assignment
            answer = codec.decode(await socket.recv(decode=False))
            assert isinstance(answer, Resume)
            return answer.offset

    assert asyncio.run(scenario()) == 100


async def _offering(socket: ClientConnection, update: NamedTensors) -> str:
    """Get an assignment and offer this update for it; the assignment."""
    device = RawDevice.over(socket, "slow")
    await device.join()
    answer = await device.ask(CheckIn(FINGERPRINT, 10))
    assert isinstance(answer, Assignment)
    await device.send(device.report(answer, update.payload(), 10))
    return answer.assignment
