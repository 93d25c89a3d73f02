"""One device's conversation over one connection, as the coordinator holds it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

from coordinator.enrolment import Admitted, Gate
from coordinator.errors import RefusedError, StoreError
from coordinator.federations import Federations, UnknownFederationError
from coordinator.happenings import Connected, Disconnected, Heard, Observer, Said, unobserved
from coordinator.room import NoRoomError, Place
from coordinator.service import FederationService
from coordinator.uploads import Upload
from protocol import limits
from protocol.connection import Connection, Role, State, default_hello
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.fingerprints import difference
from protocol.link import Link, LinkClosedError
from protocol.messages import (
    Challenge,
    CheckIn,
    Chunk,
    Fetch,
    Finished,
    Goodbye,
    Hello,
    Join,
    Joined,
    Message,
    Refusal,
    Report,
    Resume,
)
from protocol.transfer import chunks

if TYPE_CHECKING:
    from coordinator.roster import Roster

log = logging.getLogger("pf2lora.coordinator")

# A device that must speak next and does not for this long is let go; an upload resumes.
GREETING_TIMEOUT_S: Final = 20.0
FIRST_WORD_TIMEOUT_S: Final = 5.0  # of who will be refused
CHUNK_TIMEOUT_S: Final = 20.0
# Slower than a chunk in this time is no link.
SEND_TIMEOUT_S: Final = 60.0
# Silence while a device has nothing to say ends this long after a round's deadline.
SILENCE_GRACE_S: Final = 600.0
RETRY_AFTER_S: Final = 1.0
HANG_UP_S: Final = 1.0

Result = TypeVar("Result")


class DeviceSession:
    """Answers one device until it leaves, is refused, superseded or told goodbye."""

    def __init__(
        self,
        link: Link,
        federations: Federations,
        roster: Roster,
        gate: Gate,
        observe: Observer = unobserved,
    ) -> None:
        self._link = link
        self._federations = federations
        self._service: FederationService
        self._roster = roster
        self._observe = observe
        self._gate = gate
        self._connection = Connection(Role.COORDINATOR, default_hello("pf2lora-coordinator"))
        self._incoming: asyncio.Task[bytes] | None = None
        self._stop: asyncio.Future[RefusedError | None] = asyncio.get_running_loop().create_future()
        self.federation = ""
        self._admitted: Admitted | None = None
        self._told_end = False
        self._expelled: RefusedError | None = None
        self._putting_out: asyncio.Task[None] | None = None

    @property
    def device(self) -> str:
        """Who is at the other end, once that is proven; empty before."""
        return self._admitted.device if self._admitted else ""

    async def run(self) -> None:
        """Hold the conversation; returns when the connection is over, whatever the reason."""
        self._observe(Connected())
        try:
            await self._converse()
        except RemoteProtocolError as error:
            await self._refuse(error.code, str(error))
        except RefusedError as error:
            await self._refuse(error.code, str(error), error.retry_after_s)
        except NoRoomError as error:
            await self._refuse(ErrorCode.BUSY, str(error), error.retry_after_s)
        except LinkClosedError:
            pass
        except ConnectionError as error:
            await self._refuse(ErrorCode.INTERNAL, str(error))
        except StoreError as error:
            # It names files and databases, which are no device's affair.
            log.error("%s", error, extra={"federation": self.federation, "device": self.device})
            await self._refuse(ErrorCode.INTERNAL, "the coordinator's store has failed")
        finally:
            self._observe(Disconnected(self.federation, self.device))
            if self._incoming:
                self._incoming.cancel()
            if self._roster.remove(self):
                with contextlib.suppress(Exception):
                    if self._expelled:
                        await self._service.expelled(self.device, str(self._expelled))
                    else:
                        await self._service.left(self.device)
            await self._link.close()

    async def turn_away(self, reason: str, retry_after_s: float) -> None:
        """Answer a connection's first word with a refusal."""
        with contextlib.suppress(TimeoutError, LinkClosedError, RemoteProtocolError):
            async with asyncio.timeout(FIRST_WORD_TIMEOUT_S):
                self._connection.receive(await self._link.receive())
        await self._refuse(ErrorCode.BUSY, reason, retry_after_s)
        await self._link.close()

    def stop(self, refusal: RefusedError | None = None) -> None:
        """End at the next moment that loses nothing; with a refusal, or with a goodbye."""
        if not self._stop.done():
            self._stop.set_result(refusal)

    async def hang_up(self) -> None:
        """End now; what has come of an upload is kept."""
        await self._link.close()

    def expel(self, refusal: RefusedError) -> None:
        """End now, whatever is under way: nothing that comes from here on is looked at."""
        if self._expelled is None:
            self._expelled = refusal
            self._putting_out = asyncio.create_task(self._put_out(refusal))

    async def _put_out(self, refusal: RefusedError) -> None:
        # The device may be in the middle of a transfer, or not listening at all.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANG_UP_S):
                await self._refuse(refusal.code, str(refusal))
        await self._link.close()

    async def _converse(self) -> None:
        await self._greet()
        while await self._answer(await self._receive()):
            pass  # with nothing in this frame: a report is not to be held until the next message

    async def _answer(self, message: Message | None) -> bool:
        """Whether the conversation goes on."""
        match message:
            case CheckIn():
                await self._check_in(message)
            case Fetch():
                await self._send_payload(message)
            case Report():
                await self._take_report(self._service.shared(message))
            case Goodbye() if self._told_end:
                self._service.has_all(self.device)
                return False
            case None | Goodbye():
                return False
        return True

    async def _greet(self) -> None:
        hello = await self._receive()
        if not isinstance(hello, Hello):
            raise LinkClosedError
        await self._send(default_hello("pf2lora-coordinator"))
        challenge = Challenge(secrets.token_bytes(limits.NONCE_BYTES))
        await self._send(challenge)
        join = await self._receive()
        if not isinstance(join, Join):
            raise LinkClosedError
        # First of all: who is not let in learns of no federation's name.
        self._admitted = await self._gate.admit(
            join, challenge.nonce, self._connection.version, self._link.channel
        )
        try:
            self._service = self._federations.named(join.federation)
        except UnknownFederationError as error:
            raise RefusedError(ErrorCode.UNKNOWN_FEDERATION, str(error)) from None
        wait_s = self._roster.joins.take(self.device)
        if wait_s:
            raise RefusedError(ErrorCode.BUSY, "this device connects too often", wait_s)
        # Only now: whoever watches must not take the end of this for the device's going away.
        settings = self._service.settings
        self.federation = settings.name
        self._roster.add(self)
        self._service.joined(self.device)
        await self._send(Joined(settings))

    async def _check_in(self, message: CheckIn) -> None:
        wanted = self._service.settings.fingerprint
        if wanted and message.fingerprint != wanted:
            raise RefusedError(
                ErrorCode.FINGERPRINT,
                f"the device's backbone is {message.fingerprint}, the federation's is {wanted}: "
                + difference(message.fingerprint, wanted),
            )
        ineligible = self._service.ineligible(self.device, message.examples)
        if ineligible:
            raise RefusedError(ErrorCode.INELIGIBLE, ineligible)
        answer = await self._unless_left(self._service.check_in(self.device, message.rank))
        await self._send(answer)
        self._told_end = isinstance(answer, Finished)

    async def _send_payload(self, fetch: Fetch) -> None:
        tensors = await self._service.payload(fetch.digest)
        if tensors is None:
            raise RefusedError(ErrorCode.NOT_FOUND, "that base version is no longer served")
        chunk_bytes = self._connection.chunk_bytes
        # In memory a download is what is being packed and what the socket has not taken yet.
        async with self._roster.downloads.place(2 * chunk_bytes) as place:
            for chunk in chunks(tensors.buffer, fetch.offset, chunk_bytes):
                await self._send(chunk)
                if place.turn_is_over and not chunk.last:
                    raise _turn_is_over()

    async def _take_report(self, report: Report) -> None:
        if self._admitted is None:
            raise LinkClosedError
        self._admitted.check_report(report, self._service.settings.name)
        await self._gate.keep(self._admitted)
        reply = await self._service.offer(self.device, report)
        if isinstance(reply, Resume):
            # Also what the socket has read ahead, which is no more than all there is to come.
            size_bytes = report.payload.size_bytes
            size_bytes += min(size_bytes, 2 * self._connection.chunk_bytes)
            async with self._roster.uploads.place(size_bytes) as place:
                if self._expelled:
                    raise self._expelled
                if place.waited:  # its round may be over meanwhile
                    reply = await self._service.offer(self.device, report)
                if isinstance(reply, Resume):
                    await self._take_update(report, place)
                    return
        await self._send(reply)

    async def _take_update(self, report: Report, place: Place) -> None:
        async with self._service.uploads.resumed(report) as upload:
            await self._send(Resume(upload.offset))
            while self._connection.state is State.UPLOADING:
                await self._take_chunk(upload, place)
            update = await upload.tensors()
        await self._send(await self._service.take(self.device, report, update))

    async def _take_chunk(self, upload: Upload, place: Place) -> None:
        chunk = await self._receive()
        if not isinstance(chunk, Chunk):
            raise LinkClosedError
        await upload.accept(chunk)
        if place.turn_is_over and not chunk.last:
            raise _turn_is_over()

    # --- the wire -----------------------------------------------------------------------------

    async def _send(self, message: Message) -> None:
        if self._expelled:
            raise self._expelled
        await self._put(message)

    async def _put(self, message: Message) -> None:
        data = self._connection.send(message)
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._link.send(data)
        except TimeoutError:
            raise LinkClosedError(f"the device took nothing for {SEND_TIMEOUT_S:g} s") from None
        self._observe(Said(self.federation, self.device, message, len(data)))

    async def _receive(self) -> Message | None:
        """The device's next message; None when this session was told to stop between two."""
        timeout_s = self._patience_s()
        if self._connection.state is State.UPLOADING:
            # Nothing else is waited for. Taken at once, as little as can be is read ahead.
            try:
                async with asyncio.timeout(timeout_s):
                    return self._heard(await self._link.receive())
            except TimeoutError:
                raise RefusedError(
                    ErrorCode.TIMEOUT, f"no whole chunk came in {timeout_s:g} s"
                ) from None
        if self._incoming is None:
            self._incoming = asyncio.create_task(self._link.receive())
            self._incoming.add_done_callback(_looked_at)
        awaited: set[asyncio.Future[Any]] = {self._incoming, self._stop}
        await asyncio.wait(awaited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._incoming.done():
            task, self._incoming = self._incoming, None
            if self._expelled:
                raise self._expelled
            return self._heard(task.result())
        if not self._stop.done():
            raise _silent(timeout_s)
        refusal = self._stop.result()
        if refusal is not None:
            raise refusal
        await self._send(Goodbye("the coordinator is stopping; come back later"))
        return None

    def _heard(self, data: bytes) -> Message:
        if self._expelled:
            raise self._expelled
        message = self._connection.receive(data)
        self._observe(Heard(self.federation, self.device, message, len(data)))
        return message

    def _patience_s(self) -> float | None:
        """How long the device may be silent now; None while it waits for this side."""
        match self._connection.state:
            case State.WAITING:
                return None
            case State.READY:  # it trains, or sets itself up
                return self._service.settings.rounds.deadline_s + SILENCE_GRACE_S
            case State.UPLOADING:
                return CHUNK_TIMEOUT_S
            case _:
                return GREETING_TIMEOUT_S

    async def _unless_left(self, answer: Coroutine[Any, Any, Message]) -> Message:
        """Wait for the service's answer, but no longer than the device is there."""
        asked = asyncio.create_task(answer)
        listening = asyncio.create_task(self._listen())
        try:
            await asyncio.wait({asked, listening}, return_when=asyncio.FIRST_COMPLETED)
            # It may leave, or be told to, in the moment of its answer: which it gets another time.
            if not asked.done() or self._connection.state is not State.WAITING:
                await listening
                raise LinkClosedError
            return asked.result()
        finally:
            asked.cancel()
            listening.cancel()

    async def _listen(self) -> None:
        """Returns when the waiting device has left or this session must stop."""
        await self._receive()

    async def _refuse(
        self, code: ErrorCode, reason: str, retry_after_s: float = RETRY_AFTER_S
    ) -> None:
        if self._connection.state is State.CLOSED:
            return
        self._roster.refusals.tell(self.federation, self.device, code, reason)
        short = reason.encode()[:500].decode(errors="ignore")
        with contextlib.suppress(LinkClosedError):
            await self._put(Refusal(code, short, retry_after_s))


def _looked_at(task: asyncio.Task[bytes]) -> None:
    # A session that ends for a reason of its own never asks how its last receive ended.
    if not task.cancelled():
        task.exception()


def _silent(timeout_s: float | None) -> RefusedError:
    return RefusedError(ErrorCode.TIMEOUT, f"nothing came for {timeout_s:g} s")


def _turn_is_over() -> RefusedError:
    return RefusedError(ErrorCode.BUSY, "others wait; go on later from here", RETRY_AFTER_S)
