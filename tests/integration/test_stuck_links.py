"""Links that lead nowhere: those that take nothing more are closed without waiting for room to say
so, and a proxy in front of no coordinator is called one."""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from coordinator import server
from coordinator.rates import Buckets
from edge_client import transport
from edge_client.transport import websocket_dial
from protocol.link import Link, LinkClosedError

SOON_S = 5.0
GREETING = b"""\
GET / HTTP/1.1\r
Host: localhost\r
Upgrade: websocket\r
Connection: Upgrade\r
Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r
Sec-WebSocket-Version: 13\r
\r
"""


async def _fill_and_close(link: Link, socket: ClientConnection | ServerConnection) -> None:
    """Say more than there is room for, as the other side reads nothing, and close."""
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                while True:
                    await link.send(bytes(1 << 20))
        async with asyncio.timeout(SOON_S):
            await link.close()
    finally:
        socket.transport.abort()


def test_the_coordinator_lets_go_of_a_device_that_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "CLOSE_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        closed: asyncio.Future[None] = loop.create_future()

        async def handle(connection: ServerConnection) -> None:
            free = Buckets(0.0, 0.0, loop.time)
            link = server.WebSocketLink(connection, free, free, "", b"")
            try:
                await _fill_and_close(link, connection)
                closed.set_result(None)
            except TimeoutError as error:
                closed.set_exception(error)

        async with serve(handle, "127.0.0.1", 0) as running:
            address = running.sockets[0].getsockname()
            _, device = await asyncio.open_connection(*address)
            device.write(GREETING)
            await closed
            device.close()

    asyncio.run(scenario())


def test_a_device_lets_go_of_a_coordinator_that_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "CLOSE_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async def handle(connection: ServerConnection) -> None:
            connection.transport.pause_reading()
            await connection.wait_closed()

        async with serve(handle, "127.0.0.1", 0) as running:
            address = running.sockets[0].getsockname()
            link = await websocket_dial(f"127.0.0.1:{address[1]}")()
            assert isinstance(link, transport.WebSocketLink)
            try:
                await _fill_and_close(link, link._socket)
            finally:
                for connection in running.connections:
                    connection.transport.abort()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (HTTPStatus.BAD_GATEWAY, "HTTP 502; a proxy answers there, and no coordinator behind it"),
        (HTTPStatus.SERVICE_UNAVAILABLE, "HTTP 503; a proxy on the way takes no more"),
        (HTTPStatus.UPGRADE_REQUIRED, "HTTP 426; does a proxy on the way not pass on Upgrade"),
        (HTTPStatus.NOT_FOUND, "HTTP 404; is this the coordinator's own port"),
    ],
)
def test_a_device_says_what_stands_in_for_its_coordinator(status: HTTPStatus, problem: str) -> None:
    async def scenario() -> None:
        async def nobody(connection: ServerConnection) -> None:
            pass

        def answer(connection: ServerConnection, _: Request) -> Response:
            return connection.respond(status, "")

        async with serve(nobody, "127.0.0.1", 0, process_request=answer) as running:
            port = running.sockets[0].getsockname()[1]
            await websocket_dial(f"127.0.0.1:{port}")()

    with pytest.raises(LinkClosedError, match=problem):
        asyncio.run(scenario())
