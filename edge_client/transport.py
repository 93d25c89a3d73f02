"""How a device reaches the coordinator: `dial` gives a Link, here over a WebSocket."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import SplitResult, urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.uri import parse_uri

from edge_client.errors import ConfigurationError
from edge_client.tls import TlsFiles, client_context, explained, is_untrusted
from protocol import limits
from protocol.link import Link, LinkClosedError, is_loopback
from protocol.signing import channel_of

log = logging.getLogger("pf2lora.client")

Dial = Callable[[], Awaitable[Link]]

OPEN_TIMEOUT_S: Final = 20.0
PING_INTERVAL_S: Final = 20.0
PONG_TIMEOUT_S: Final = 60.0
CLOSE_TIMEOUT_S: Final = 5.0  # for the other side's answer to a goodbye


class UntrustedError(LinkClosedError):
    """The coordinator's certificate is not one that this device takes."""


class WebSocketLink:
    """A client-side WebSocket as a Link."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        tls: ssl.SSLObject | None = socket.transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls else None
        self.channel = channel_of(certificate) if certificate else b""

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
        # Where the other side takes nothing, there is never room to say goodbye.
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._socket.close()
        except TimeoutError:
            self._socket.transport.abort()


def websocket_dial(coordinator: str, tls: TlsFiles | None = None) -> Dial:
    """What opens connections to `ws://host:port`, `wss://host:port` or plain `host:port`.

    Over wss the coordinator's certificate and host name are checked.

    Raises:
        ConfigurationError: the address is none.
    """
    address, parts = _address(coordinator)
    files = tls or TlsFiles()
    if parts.scheme == "ws" and files != TlsFiles():
        raise ConfigurationError("coordinator", f"{address} has no TLS", "wss://host:port")
    context = client_context(files) if parts.scheme == "wss" else None
    if context is None and not is_loopback(str(parts.hostname)):
        log.warning(
            "%s has no TLS: whoever is on the way can read and change what is sent", address
        )

    async def dial() -> Link:
        try:
            socket = await connect(
                address,
                ssl=context,
                max_size=limits.MESSAGE_BYTES_MAX,
                compression=None,
                proxy=None,
                open_timeout=OPEN_TIMEOUT_S,
                ping_interval=PING_INTERVAL_S,
                ping_timeout=PONG_TIMEOUT_S,
            )
        except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed) as error:
            kind = UntrustedError if is_untrusted(error) else LinkClosedError
            raise kind(f"{address}: {explained(error, encrypted=bool(context))}") from error
        return WebSocketLink(socket)

    return dial


def _address(coordinator: str) -> tuple[str, SplitResult]:
    """The whole address, and its parts.

    Raises:
        ConfigurationError: it is none.
    """
    given = coordinator if isinstance(coordinator, str) else ""
    address = given if "://" in given else f"ws://{given}"
    try:
        parts = urlsplit(address)
        parse_uri(address)
        if parts.scheme in ("ws", "wss") and parts.hostname and parts.port:
            return address, parts
    except (ValueError, InvalidURI):
        pass
    raise ConfigurationError(
        "coordinator", f"{coordinator!r} is no address", "ws://host:port, wss://host:port"
    )
