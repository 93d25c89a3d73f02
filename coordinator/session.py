"""One device's conversation over one connection, as the coordinator holds it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from coordinator.federations import Federations, UnknownFederationError
from coordinator.service import FederationService
from protocol.connection import Connection, Role, State, default_hello
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.link import Link, LinkClosedError
from protocol.messages import (
    CheckIn,
    Chunk,
    Fetch,
    Goodbye,
    Hello,
    Join,
    Joined,
    Message,
    Refusal,
    Report,
)
from protocol.transfer import chunks

log = logging.getLogger("pf2lora.coordinator")

# A device that must speak next (a greeting, the next chunk) and does not for this long is let go.
# While it trains it may be silent: there the link's own keepalive tells a dead device.
MESSAGE_TIMEOUT_S: Final = 60.0
RETRY_AFTER_S: Final = 1.0

Result = TypeVar("Result")


class RefusedError(Exception):
    """This session ends here, with a reason for the device."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class DeviceSession:
    """Answers one device until it leaves, is refused, superseded or told goodbye."""

    def __init__(self, link: Link, federations: Federations, roster: Roster) -> None:
        self._link = link
        self._federations = federations
        self._service: FederationService
        self._roster = roster
        self._connection = Connection(Role.COORDINATOR, default_hello("pf2lora-coordinator"))
        self._incoming: asyncio.Task[bytes] | None = None
        self._stop: asyncio.Future[RefusedError | None] = asyncio.get_running_loop().create_future()
        self.device = ""
        self.federation = ""

    async def run(self) -> None:
        """Hold the conversation; returns when the connection is over, whatever the reason."""
        try:
            await self._converse()
        except RemoteProtocolError as error:
            await self._refuse(error.code, str(error))
        except RefusedError as error:
            await self._refuse(error.code, str(error))
        except LinkClosedError:
            pass
        except ConnectionError as error:
            await self._refuse(ErrorCode.INTERNAL, str(error))
        finally:
            if self._incoming:
                self._incoming.cancel()
            if self._roster.remove(self):
                with contextlib.suppress(Exception):
                    await self._service.left(self.device)
            await self._link.close()

    def stop(self, refusal: RefusedError | None = None) -> None:
        """End at the next moment that loses nothing; with a refusal, or with a goodbye."""
        if not self._stop.done():
            self._stop.set_result(refusal)

    async def _converse(self) -> None:
        await self._greet()
        while True:
            match await self._receive():
                case CheckIn() as check_in:
                    await self._check_in(check_in)
                case Fetch() as fetch:
                    await self._send_payload(fetch)
                case Report() as report:
                    await self._take_report(report)
                case None | Goodbye():
                    return

    async def _greet(self) -> None:
        hello = await self._receive()
        if not isinstance(hello, Hello):
            raise LinkClosedError
        await self._send(default_hello("pf2lora-coordinator"))
        join = await self._receive()
        if not isinstance(join, Join):
            raise LinkClosedError
        try:
            self._service = self._federations.named(join.federation)
        except UnknownFederationError as error:
            raise RefusedError(ErrorCode.UNKNOWN_FEDERATION, str(error)) from None
        settings = self._service.settings
        self.device, self.federation = join.device, settings.name
        self._roster.add(self)
        self._service.joined(join.device)
        await self._send(Joined(settings))

    async def _check_in(self, message: CheckIn) -> None:
        wanted = self._service.settings.backbone.fingerprint
        if message.fingerprint != wanted:
            raise RefusedError(
                ErrorCode.FINGERPRINT,
                f"the device's backbone is {message.fingerprint}, the federation's is {wanted}",
            )
        least = self._service.settings.rounds.minimum_examples
        if message.examples < least:
            raise RefusedError(
                ErrorCode.INELIGIBLE,
                f"the device has {message.examples} examples, the federation asks for {least}",
            )
        answer = await self._unless_left(self._service.check_in(self.device, message.rank))
        await self._send(answer)

    async def _send_payload(self, fetch: Fetch) -> None:
        tensors = await self._service.payload(fetch.digest)
        if tensors is None:
            raise RefusedError(ErrorCode.NOT_FOUND, "that base version is no longer served")
        for chunk in chunks(tensors.buffer, fetch.offset, self._connection.chunk_bytes):
            await self._send(chunk)

    async def _take_report(self, report: Report) -> None:
        reply, receiver = await self._service.offer(self.device, report)
        await self._send(reply)
        if receiver is None:
            return
        while self._connection.state is State.UPLOADING:
            chunk = await self._receive()
            if not isinstance(chunk, Chunk):
                raise LinkClosedError
            receiver.accept(chunk)
        update = receiver.tensors()
        await self._send(await self._service.take(self.device, report, update))

    # --- the wire -----------------------------------------------------------------------------

    async def _send(self, message: Message) -> None:
        await self._link.send(self._connection.send(message))

    async def _receive(self) -> Message | None:
        """The device's next message; None when this session was told to stop between two."""
        waiting = self._connection.state in (State.READY, State.WAITING)
        if self._incoming is None:
            self._incoming = asyncio.create_task(self._link.receive())
        uploading = self._connection.state is State.UPLOADING
        awaited: set[asyncio.Future[Any]] = {self._incoming}
        if not uploading:
            awaited.add(self._stop)
        await asyncio.wait(
            awaited,
            timeout=None if waiting else MESSAGE_TIMEOUT_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if self._incoming.done():
            task, self._incoming = self._incoming, None
            return self._connection.receive(task.result())
        if not self._stop.done():
            raise RefusedError(ErrorCode.TIMEOUT, f"nothing came for {MESSAGE_TIMEOUT_S:g} s")
        refusal = self._stop.result()
        if refusal is not None:
            raise refusal
        await self._send(Goodbye("the coordinator is stopping; come back later"))
        return None

    async def _unless_left(self, answer: Coroutine[Any, Any, Message]) -> Message:
        """Wait for the service's answer, but no longer than the device is there."""
        asked = asyncio.create_task(answer)
        listening = asyncio.create_task(self._listen())
        try:
            await asyncio.wait({asked, listening}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                listening.result()
                raise LinkClosedError
            return asked.result()
        finally:
            asked.cancel()
            listening.cancel()

    async def _listen(self) -> None:
        """Returns when the waiting device has left or this session must stop."""
        await self._receive()

    async def _refuse(self, code: ErrorCode, reason: str) -> None:
        log.warning("refused %s: %s: %s", self.device or "a device", code.value, reason)
        if self._connection.state is State.CLOSED:
            return
        short = reason.encode()[:500].decode(errors="ignore")
        with contextlib.suppress(LinkClosedError):
            await self._send(Refusal(code, short, RETRY_AFTER_S))


class Roster:
    """The joined sessions, one a device and federation: a newer takes an older one's place."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, str], DeviceSession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, session: DeviceSession) -> None:
        key = session.federation, session.device
        older = self._sessions.get(key)
        self._sessions[key] = session
        if older is not None:
            older.stop(RefusedError(ErrorCode.SUPERSEDED, "this device has connected anew"))

    def remove(self, session: DeviceSession) -> bool:
        """Forget a session; True if it was the device's present one."""
        key = session.federation, session.device
        if self._sessions.get(key) is not session:
            return False
        del self._sessions[key]
        return True

    def stop_all(self) -> None:
        """Ask every session to say goodbye; an upload under way is finished first."""
        for session in list(self._sessions.values()):
            session.stop()
