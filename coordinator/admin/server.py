"""The admin port itself: uvicorn on the daemon's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from coordinator.errors import AddressError

DRAIN_S: Final = 2
BACKLOG: Final = 128


class AdminServer:
    """Listens from `open` to `close`; with a certificate and its key it speaks TLS.

    Raises:
        AddressError: the address cannot be listened on.
    """

    def __init__(
        self, app: ASGIApp, host: str, port: int, certificate: str = "", key: str = ""
    ) -> None:
        self._socket = _listen(host, port)
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
            limit_concurrency=256,
            h11_max_incomplete_event_size=16 * 1024,
            ssl_certfile=certificate or None,
            ssl_keyfile=key or None,
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port in use, where any (0) was asked for."""
        return int(self._socket.getsockname()[1])

    def open(self) -> None:
        """Begin to answer."""
        self._serving = asyncio.create_task(self._server.serve([self._socket]))

    async def close(self) -> None:
        """Answer what is under way, and end."""
        self._server.should_exit = True
        if self._serving:
            await self._serving
        self._socket.close()


class _Server(uvicorn.Server):
    """Leaves the process's signals to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server((host, port), family=found[0][0], backlog=BACKLOG)
    except OSError as error:
        raise AddressError("admin", host, port, error) from error
