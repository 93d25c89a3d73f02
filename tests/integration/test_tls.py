"""TLS tried from both sides: whose certificate is trusted, and what is said where it is not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from coordinator import certificates, config, server
from coordinator.certificates import Authority
from coordinator.server import CoordinatorServer
from edge_client.errors import UnreachableError
from edge_client.session import Session
from edge_client.tls import TlsFiles
from edge_client.transport import websocket_dial
from protocol.link import LinkClosedError
from protocol.messages import (
    Joined,
)
from tests.integration.outside import GOOD, Outside, opened, written
from tests.simulation.raw_device import RawDevice
from tests.simulation.world import FakeDevice


@asynccontextmanager
async def _mutual(folder: Path) -> AsyncIterator[Outside]:
    Authority(folder / "clients").issue_client("ward-3", 1.0)
    async with opened(folder, client_ca="clients/ca.pem") as outside:
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


def test_a_load_test_shows_the_certificate_it_is_given(tmp_path: Path) -> None:
    async def scenario() -> tuple[int | None, dict[str, Any]]:
        Authority(tmp_path / "clients").issue_client("load", 1.0)
        async with opened(tmp_path, client_ca="clients/ca.pem", enrolment="open") as outside:
            address = f"wss://127.0.0.1:{outside.server.port}"
            flags = f"--coordinator {address} --spoil-federation sim --ca-file {tmp_path}/ca.pem"
            own = f"{tmp_path}/clients/client-load"
            flags += f" --client-certificate {own}.pem --client-key {own}.key"
            command = f"{sys.executable} -m edge_client.fleet.cli --devices 2 --run-time 1s --json"
            process = await asyncio.create_subprocess_exec(
                *f"{command} {flags}".split(), stdout=asyncio.subprocess.PIPE
            )
            said, _ = await process.communicate()
            return process.returncode, json.loads(said)

    code, report = asyncio.run(scenario())
    assert code == 0
    assert report["joined"] == 2


def _certify(folder: Path, host: str, days: float) -> None:
    for file in ("ca.pem", "ca.key", "server.pem", "server.key"):
        (folder / file).unlink()
    Authority(folder).issue_server([host], days)


@pytest.mark.parametrize(
    ("host", "days", "scheme", "ca_file", "problem"),
    [
        ("127.0.0.1", 1.0, "wss", None, "an authority that this device does not know; give its ca"),
        ("127.0.0.1", 1.0, "wss", "other/ca.pem", "an authority that this device does not know"),
        ("127.0.0.1", -1.0, "wss", "ca.pem", "certificate has expired, or .* clock is fast"),
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
    path = written(tmp_path)
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


def test_a_connection_over_tls_takes_little_memory(tmp_path: Path) -> None:
    """asyncio has 256 KiB for each, which the device's end, here in the same process, keeps."""

    async def scenario() -> int:
        async with opened(tmp_path) as outside, contextlib.AsyncExitStack() as stack:
            dial = websocket_dial(
                f"wss://127.0.0.1:{outside.server.port}", TlsFiles(tmp_path / "ca.pem")
            )
            tracemalloc.start()
            stack.callback(tracemalloc.stop)
            for _ in range(5):
                stack.push_async_callback((await dial()).close)
            return tracemalloc.get_traced_memory()[0] // 5

    assert asyncio.run(scenario()) < (256 + 128) * 1024


def test_who_does_not_finish_the_handshake_is_counted_among_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "OPEN_TIMEOUT_S", 3600.0)
    monkeypatch.setattr(server, "TURNED_AWAY_MAX", 2)

    async def scenario() -> None:
        async with opened(tmp_path, connections_max="1") as outside:
            outside.approve(GOOD)
            headcount, port = outside.server.headcount, outside.server.port

            async def silent() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                return await asyncio.open_connection("127.0.0.1", port)

            waiting = [await silent() for _ in range(3)]
            reader, writer = await silent()
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""  # the fourth is one too many, and let go at once
            writer.close()
            waiting[0][1].close()
            waiting[1][1].write(b"this is no handshake")  # refused
            while headcount.open > 1:  # noqa: ASYNC110 - it is on its way
                await asyncio.sleep(0.01)
            device = await outside.dial(GOOD)
            assert isinstance(await device.join(), Joined)
            assert headcount.open == 2
            for _, writer in waiting:
                writer.close()

    asyncio.run(scenario())


def test_an_untrusted_certificate_is_not_tried_again_at_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as outside:
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
