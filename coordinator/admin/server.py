"""The admin port itself: uvicorn on the daemon's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any, Final, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from coordinator.counted import Counted, CountedTls, Headcount
from coordinator.errors import AddressError
from coordinator.security import tls_with

DRAIN_S: Final = 2
# A connection without a request is let go so soon, and at most twice so late.
REQUEST_TIMEOUT_S: Final = 10.0
# Over so many requests are answered with 503; beyond twice as many connections are dropped.
REQUESTS_MAX: Final = 256
CONNECTIONS_MAX: Final = 2 * REQUESTS_MAX
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
        self._headcount = Headcount(CONNECTIONS_MAX)
        self._tls = tls_with(certificate, key) if certificate else None
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="error",  # it warns of every request that is none, or is one too many
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
            limit_concurrency=REQUESTS_MAX,
            http=cast(type[asyncio.Protocol], self._protocol),
            ws="none",  # such a connection would leave our protocol, and the count of them
            h11_max_incomplete_event_size=16 * 1024,
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

    def _protocol(self, **options: Any) -> asyncio.BaseProtocol:
        """What the bytes of a new connection go to."""
        if self._tls is None:
            return _CountedHttp(self._headcount, **options)
        return CountedTls(
            self._headcount,
            _Impatient(**options),
            self._tls,
            handshake_timeout_s=REQUEST_TIMEOUT_S,
            shutdown_timeout_s=DRAIN_S,
        )

    async def close(self) -> None:
        """Answer what is under way, and end."""
        self._server.should_exit = True
        if self._serving:
            await self._serving
        self._socket.close()


class _Impatient(H11Protocol):
    """Lets go of who asks for nothing, where uvicorn would wait for ever for a first request.

    Silent connections count among those that there may be, and would keep health checks out.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look = self.loop.call_later(REQUEST_TIMEOUT_S, self._let_go_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def _let_go_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self._look = self.loop.call_later(REQUEST_TIMEOUT_S, self._let_go_if_idle)


class _CountedHttp(Counted, _Impatient):
    """HTTP without TLS."""


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
