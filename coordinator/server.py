"""The WebSocket server: connections in, sessions out, and an end in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as serve_websocket
from websockets.exceptions import ConnectionClosed

from coordinator.config import Configuration, Federation
from coordinator.errors import AddressError
from coordinator.federations import Federations
from coordinator.service import FederationService
from coordinator.session import DeviceSession, Roster
from coordinator.store.sql import SqlStore
from protocol import limits
from protocol.link import LinkClosedError

log = logging.getLogger("pf2lora.coordinator")

PING_INTERVAL_S: Final = 20.0
PONG_TIMEOUT_S: Final = 60.0
DRAIN_S: Final = 15.0
CONTROL_EVERY_S: Final = 1.0
FINISH_GRACE_S: Final = 60.0
CLOSE_TRY_AGAIN_LATER: Final = 1013

Result = TypeVar("Result")


class WebSocketLink:
    """A server-side WebSocket as a Link."""

    def __init__(self, socket: ServerConnection) -> None:
        self._socket = socket

    async def send(self, data: bytes) -> None:
        try:
            await self._socket.send(data)
        except ConnectionClosed as error:
            raise LinkClosedError(str(error)) from error

    async def receive(self) -> bytes:
        try:
            data = await self._socket.recv(decode=False)
        except ConnectionClosed as error:
            raise LinkClosedError(str(error)) from error
        return data

    async def close(self) -> None:
        await self._socket.close()


class CoordinatorServer:
    """A running coordinator: `async with` it, then wait."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._roster = Roster()
        self._connections = 0
        # One thread for the store: its calls stay in order and off the event loop.
        self._store_thread = ThreadPoolExecutor(1, "store")
        self._ended = asyncio.Event()  # some connection has
        self.stopping = asyncio.Event()

    async def __aenter__(self) -> CoordinatorServer:
        server = self._configuration.server
        self._store = await self._run_blocking(lambda: SqlStore(server.store))
        try:
            self.federations = Federations(map(self._service_of, self._configuration.federations))
            for service in self.federations:
                await service.open()
            self._server = await self._listen()
        except BaseException:
            await self._run_blocking(self._store.close)
            self._store_thread.shutdown()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close(close_connections=False)
        self._roster.stop_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._connections:
                    self._ended.clear()
                    await self._ended.wait()
        self._server.close()
        await self._server.wait_closed()
        self.federations.close()
        await self._run_blocking(self._store.close)
        self._store_thread.shutdown()

    @property
    def port(self) -> int:
        """The port in use, where the configuration asked for any (0)."""
        address = next(iter(self._server.sockets)).getsockname()
        return int(address[1])

    async def wait(self) -> None:
        """Until asked to stop, or (where so configured) until the last device is done.

        Raises:
            StoreError: the store failed; nothing unkept was acknowledged.
        """
        waits: set[asyncio.Future[Any]] = {
            asyncio.ensure_future(self.stopping.wait()),
            *self.federations.failures,
        }
        if self._configuration.server.exit_when_finished:
            waits.add(asyncio.ensure_future(self._finished()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for failure in self.federations.failures:
                if failure.done():
                    failure.result()
        finally:
            for one in waits:
                one.cancel()

    def _service_of(self, federation: Federation) -> FederationService:
        return FederationService(
            federation.settings,
            federation.start,
            self._store,
            rng=random.Random(federation.settings.seed),
            run_blocking=self._run_blocking,
            hold_s=self._configuration.server.hold_s,
            control_every_s=CONTROL_EVERY_S,
        )

    async def _listen(self) -> Server:
        server = self._configuration.server
        try:
            return await serve_websocket(
                self._handle,
                server.host,
                server.port,
                max_size=limits.MESSAGE_BYTES_MAX,
                max_queue=8,
                compression=None,
                ping_interval=PING_INTERVAL_S,
                ping_timeout=PONG_TIMEOUT_S,
            )
        except OSError as error:
            raise AddressError(f"cannot listen on {server.host}:{server.port}: {error}") from error

    async def _handle(self, socket: ServerConnection) -> None:
        if self._connections >= self._configuration.server.connections_max:
            await socket.close(CLOSE_TRY_AGAIN_LATER, "too many connections; come back later")
            return
        self._connections += 1
        try:
            await DeviceSession(WebSocketLink(socket), self.federations, self._roster).run()
        finally:
            self._connections -= 1
            self._ended.set()

    async def _finished(self) -> None:
        """Returns when every device knows the end, or those that do not stay away for long."""
        while True:
            self._ended.clear()
            quiet = self.federations.finished and not self._connections
            if quiet and self.federations.everyone_told:
                return
            try:
                async with asyncio.timeout(FINISH_GRACE_S):
                    await self._ended.wait()
            except TimeoutError:
                if quiet:
                    return

    async def _run_blocking(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._store_thread, call)


async def serve(configuration: Configuration) -> None:
    """Run until SIGTERM or SIGINT, draining once; a second signal ends at once.

    Raises:
        CoordinatorError: of the kind that tells the exit code.
    """
    server = CoordinatorServer(configuration)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop_or_die, server, number)
    async with server:
        log.info("listening on %s:%d", configuration.server.host, server.port)
        await server.wait()
        log.info("stopping")


def _stop_or_die(server: CoordinatorServer, number: int) -> None:
    if server.stopping.is_set():
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    server.stopping.set()
