"""What the system holds of a connection that is slow to take what it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from coordinator.counted import Counted, Headcount

SAID = bytes(1 << 16)


class _Talkative(Counted, asyncio.Protocol):
    """Says as much as the system takes, and `taken` how much that was."""

    def __init__(self, taken: asyncio.Future[int]) -> None:
        super().__init__(Headcount(1))
        self._taken = taken

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        said = 0
        while not transport.get_write_buffer_size():
            transport.write(SAID)
            said += len(SAID)
        self._taken.set_result(said - transport.get_write_buffer_size())
        transport.abort()


def test_little_stands_before_a_ping_on_a_link_that_is_slow() -> None:
    """Over 64 kbit/s the half of a MiB, which a connection may have on its way, is a minute."""

    async def scenario() -> int:
        loop = asyncio.get_running_loop()
        taken: asyncio.Future[int] = loop.create_future()
        server = await loop.create_server(lambda: _Talkative(taken), "127.0.0.1", 0)
        with contextlib.closing(socket.socket()) as device:
            device.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # little is on its way
            device.setblocking(False)
            await loop.sock_connect(device, server.sockets[0].getsockname())
            found = await taken
        server.close()
        return found

    assert asyncio.run(scenario()) < 256 * 1024
