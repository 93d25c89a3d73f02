"""The WebSocket server: connections in, sessions out, and an end in good order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import resource
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar, cast

from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as serve_websocket
from websockets.exceptions import ConnectionClosed

from coordinator.admin.server import CONNECTIONS_MAX as ADMIN_CONNECTIONS_MAX
from coordinator.aggregation.robust import Rule
from coordinator.blocking import Reader
from coordinator.config import Configuration, Federation
from coordinator.counted import Counted, CountedTls, Headcount
from coordinator.enrolment import Gate
from coordinator.errors import AddressError
from coordinator.federations import Federations
from coordinator.happenings import observed_store
from coordinator.rates import Buckets, network_of
from coordinator.roster import Roster
from coordinator.security import is_open, log_exposure, server_tls
from coordinator.service import FederationService
from coordinator.session import DeviceSession
from coordinator.store.base import Store
from coordinator.store.sql import SqlStore
from coordinator.watch import Watch
from protocol import limits
from protocol.link import LinkClosedError, authority

log = logging.getLogger("pf2lora.coordinator")

# A half-open link, or a frame that never ends, is known by the ping that nobody answers.
PING_INTERVAL_S: Final = 20.0
PONG_TIMEOUT_S: Final = 60.0
OPEN_TIMEOUT_S: Final = 10.0  # for TLS's handshake, and for WebSocket's
CLOSE_TIMEOUT_S: Final = 5.0
# What one connection may hold: messages read and not yet asked for, and bytes not yet sent.
QUEUE_MESSAGES_MAX: Final = 2
WRITE_BYTES_MAX: Final = 64 * limits.KIB
# Over the cap, so many connections at a time are told when to come back; more are dropped.
TURNED_AWAY_MAX: Final = 256
TURNED_AWAY_RETRY_S: Final = 30.0
# Descriptors beside those of connections: store, log, the listening socket.
DESCRIPTORS_SPARE: Final = 64
OPEN_MAX: Final = 10_240  # macOS takes no more where it says "unlimited" (setrlimit(2) there)
# What an address or connection may do at once is what it may do in so many seconds.
CONNECTIONS_BURST_S: Final = 100.0
MESSAGES_BURST_S: Final = 5.0
DRAIN_S: Final = 15.0
CONTROL_EVERY_S: Final = 1.0
FINISH_GRACE_S: Final = 60.0
# Sessions live long: Python would look through all of them, standing still, far too often. So many
# collections of younger objects lie between two of the old ones.
OLD_OBJECTS_EVERY: Final = 1000

Result = TypeVar("Result")


class WebSocketLink:
    """A server-side WebSocket as a Link, read no faster than the rates allow."""

    def __init__(
        self,
        connection: ServerConnection,
        own_messages: Buckets,
        messages: Buckets,
        address: str,
        channel: bytes,
    ) -> None:
        self._connection = connection
        # A device has one connection at a time, so what is counted here is the device's.
        self._own_messages = own_messages
        self._messages = messages
        self._address = address
        self.channel = channel

    async def send(self, data: bytes) -> None:
        try:
            await self._connection.send(data)
        except ConnectionClosed as error:
            raise LinkClosedError(str(error)) from error

    async def receive(self) -> bytes:
        try:
            data = await self._connection.recv(decode=False)
        except ConnectionClosed as error:
            raise LinkClosedError(str(error)) from error
        wait_s = max(self._messages.spend(self._address), self._own_messages.spend(""))
        if wait_s:
            await asyncio.sleep(wait_s)
        return data

    async def close(self) -> None:
        # Where the device takes nothing, there is never room to say goodbye.
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._connection.close()
        except TimeoutError:
            self._connection.transport.abort()


class CoordinatorServer:
    """A running coordinator: `async with` it, then wait."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._sessions: set[DeviceSession] = set()
        # One thread for the store: its calls stay in order and off the event loop.
        self._store_thread = ThreadPoolExecutor(1, "store")
        # Rules that read all reports take seconds, in which that thread serves others.
        self._rules_reader = Reader("rules", self._opened_aside)
        self._ended = asyncio.Event()  # some connection has
        self.stopping = asyncio.Event()

    async def __aenter__(self) -> CoordinatorServer:
        server = self._configuration.server
        self.tls = server_tls(server)
        rates = server.rates
        self._roster = Roster(
            server.uploads_mib * limits.MIB,
            server.downloads_mib * limits.MIB,
            rates.connections_per_device,
        )
        self._visits = _buckets(rates.connections_per_address, CONNECTIONS_BURST_S)
        self._messages = _buckets(rates.messages_per_address, MESSAGES_BURST_S)
        admin_most = ADMIN_CONNECTIONS_MAX if self._configuration.admin.enabled else 0
        self._connections_max = _affordable(server.connections_max, admin_most)
        # Of those that have not said a word as well.
        self.headcount = Headcount(self._connections_max + TURNED_AWAY_MAX)
        self._store = await self._run_blocking(lambda: SqlStore(server.store, sole=True))
        self.watch = Watch(
            self._configuration.admin,
            self._configuration.admin_token,
            self._configuration.admin_certificate,
            server.store,
            self._store.database,
            self._run_blocking,
            self._problem,
        )
        try:
            self.federations = Federations(map(self._service_of, self._configuration.federations))
            for service in self.federations:
                await service.open()
            await self.watch.begin([service.settings.name for service in self.federations])
            self._gate = Gate(
                self._store.devices,
                is_open=is_open(server),
                run_blocking=self._run_blocking,
                newcomers_max=server.newcomers_max,
            )
            if self.tls:
                self.watch.certificate_expires(self.tls.expires_at)
            self._server = await self._listen()
            self._keeping_out = asyncio.create_task(self._keep_out())
            self.watch.ready()
        except BaseException:
            await self._rules_reader.close()
            await self.watch.end()
            await self._run_blocking(self._store.close)
            self._store_thread.shutdown()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.watch.stopping()
        self._server.close(close_connections=False)
        for session in list(self._sessions):
            session.stop()  # with a goodbye; an upload under way is finished first
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._sessions:
                    self._ended.clear()
                    await self._ended.wait()
        await asyncio.gather(*(session.hang_up() for session in self._sessions))
        await self._server.wait_closed()
        self._roster.refusals.sum_up()
        self._keeping_out.cancel()
        self.federations.close()
        await self._rules_reader.close()
        await self.watch.end()
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
            self._keeping_out,
        }
        if self._configuration.server.exit_when_finished:
            waits.add(asyncio.ensure_future(self._finished()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for failure in self.federations.failures:
                if failure.done():
                    failure.result()
            if self._keeping_out.done():
                self._keeping_out.result()
        finally:
            for one in waits:
                one.cancel()

    def _service_of(self, federation: Federation) -> FederationService:
        reads_reports = isinstance(federation.settings.aggregation, Rule)
        return FederationService(
            federation.settings,
            federation.start,
            observed_store(self._store, self.watch.observe),
            rng=random.Random(federation.settings.seed),
            run_blocking=self._run_blocking,
            read_aside=self._rules_reader if reads_reports else self._read_in_turn,
            hold_s=self._configuration.server.hold_s,
            control_every_s=CONTROL_EVERY_S,
            observe=self.watch.observe,
            bounds=self._configuration.server.bounds,
        )

    async def _listen(self) -> Server:
        server = self._configuration.server
        try:
            return await serve_websocket(
                self._handle,
                server.host,
                server.port,
                create_connection=cast(type[ServerConnection], self._protocol),
                max_size=limits.MESSAGE_BYTES_MAX,
                max_queue=QUEUE_MESSAGES_MAX,
                write_limit=WRITE_BYTES_MAX,
                open_timeout=OPEN_TIMEOUT_S,
                close_timeout=CLOSE_TIMEOUT_S,
                compression=None,
                ping_interval=PING_INTERVAL_S,
                ping_timeout=PONG_TIMEOUT_S,
            )
        except OSError as error:
            raise AddressError("server", server.host, server.port, error) from error

    def _protocol(self, *args: Any, **options: Any) -> asyncio.BaseProtocol:
        """What the bytes of a new connection go to."""
        if self.tls is None:
            return _CountedWebSocket(self.headcount, *args, **options)
        return CountedTls(
            self.headcount,
            ServerConnection(*args, **options),
            self.tls.context,
            handshake_timeout_s=OPEN_TIMEOUT_S,
            shutdown_timeout_s=CLOSE_TIMEOUT_S,
        )

    async def _handle(self, connection: ServerConnection) -> None:
        for greeting in (connection.request, connection.response):
            if greeting is not None:
                greeting.headers.clear()  # kilobytes that nobody asks for from here on
        address = network_of(str(connection.remote_address[0]))
        own = _buckets(self._configuration.server.rates.messages_per_device, MESSAGES_BURST_S)
        channel = self.tls.channel if self.tls else b""
        link = WebSocketLink(connection, own, self._messages, address, channel)
        session = DeviceSession(
            link, self.federations, self._roster, self._gate, self.watch.observe
        )
        wait_s = self._visits.take(address)
        if len(self._sessions) >= self._connections_max:
            await session.turn_away("too many connections", TURNED_AWAY_RETRY_S)
            return
        if wait_s:
            await session.turn_away("too many connections from this address", max(1.0, wait_s))
            return
        self._sessions.add(session)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            self._ended.set()

    def _problem(self) -> str | None:
        """Why no device can be served, if so."""
        if self.stopping.is_set():
            return "the coordinator is stopping"
        failed = any(failure.done() for failure in self.federations.failures)
        return "the coordinator has failed" if failed else None

    async def _keep_out(self) -> None:
        while True:
            await asyncio.sleep(CONTROL_EVERY_S)
            await self._roster.expel_barred(self._gate, self.federations)

    async def _finished(self) -> None:
        """Returns when every device knows the end, or those that do not stay away for long."""
        while True:
            self._ended.clear()
            quiet = self.federations.finished and not self._sessions
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

    def _opened_aside(self) -> Store:
        store = SqlStore(self._configuration.server.store, create=False)
        return observed_store(store, self.watch.observe)

    async def _read_in_turn(self, read: Callable[[Store], Result]) -> Result:
        return await self._run_blocking(partial(read, self._store))


class _CountedWebSocket(Counted, ServerConnection):
    """A WebSocket without TLS."""


def _buckets(rate_s: float, burst_s: float) -> Buckets:
    return Buckets(rate_s, rate_s * burst_s, asyncio.get_running_loop().time)


def _affordable(connections_max: int, others_max: int) -> int:
    """As many connections as wished, or as the system has file descriptors for beside others."""
    descriptors, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return connections_max
    # Where there is no hard limit, as on macOS, few are open to a process all the same.
    descriptors = hard if hard != resource.RLIM_INFINITY else max(descriptors, OPEN_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    most = max(1, descriptors - TURNED_AWAY_MAX - others_max - DESCRIPTORS_SPARE)
    if most < connections_max:
        log.warning(
            "server.connections_max is %d, but %d file descriptors are enough for %d",
            connections_max,
            descriptors,
            most,
        )
    return min(most, connections_max)


async def serve(configuration: Configuration) -> None:
    """Run until SIGTERM or SIGINT, draining once; a second signal ends at once.

    Raises:
        CoordinatorError: of the kind that tells the exit code.
    """
    gc.set_threshold(*gc.get_threshold()[:2], OLD_OBJECTS_EVERY)
    server = CoordinatorServer(configuration)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop_or_die, server, number)
    async with server:
        log.info("listening on %s", authority(configuration.server.host, server.port))
        if server.watch.address:
            log.info("dashboard at %s", server.watch.address)
        log_exposure(configuration.server, server.tls)
        await server.wait()
        log.info("stopping")


def _stop_or_die(server: CoordinatorServer, number: int) -> None:
    if server.stopping.is_set():
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    server.stopping.set()
