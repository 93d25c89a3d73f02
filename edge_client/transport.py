"""How a device reaches the coordinator: `dial` gives a Link, here over a WebSocket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from edge_client.errors import ConfigurationError
from protocol import limits
from protocol.link import Link, LinkClosedError

Dial = Callable[[], Awaitable[Link]]

OPEN_TIMEOUT_S: Final = 20.0
PING_INTERVAL_S: Final = 20.0
PONG_TIMEOUT_S: Final = 60.0


class WebSocketLink:
    """A client-side WebSocket as a Link."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket

    async def send(self, data: bytes) -> None:
        try:
            await self._socket.send(data)
        except ConnectionClosed as error:
            raise LinkClosedError(str(error)) from error

    async def receive(self) -> bytes:
        try:
            return await self._socket.recv(decode=False)
        except ConnectionClosed as error:
            raise LinkClosedError(str(error)) from error

    async def close(self) -> None:
        await self._socket.close()


def websocket_dial(coordinator: str) -> Dial:
    """What opens connections to `ws://host:port`, `wss://host:port` or plain `host:port`.

    Raises:
        ConfigurationError: the address is none.
    """
    address = coordinator if "://" in coordinator else f"ws://{coordinator}"
    try:
        parts = urlsplit(address)
        complete = parts.scheme in ("ws", "wss") and parts.hostname and parts.port
    except ValueError:
        complete = None
    if not complete:
        raise ConfigurationError(
            "coordinator", f"{coordinator!r} is no address", "ws://host:port, wss://host:port"
        )

    async def dial() -> Link:
        try:
            socket = await connect(
                address,
                max_size=limits.MESSAGE_BYTES_MAX,
                compression=None,
                proxy=None,
                open_timeout=OPEN_TIMEOUT_S,
                ping_interval=PING_INTERVAL_S,
                ping_timeout=PONG_TIMEOUT_S,
            )
        except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed) as error:
            raise LinkClosedError(f"{address}: {error or type(error).__name__}") from error
        return WebSocketLink(socket)

    return dial
