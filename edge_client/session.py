"""One logical session of a device over as many connections as it takes.

The session moves bytes and keeps time; what they mean is the `Worker`'s affair. It is handed
the update that is to be sent and nothing else: by the import rules it cannot reach the personal
adapter.

Whatever goes wrong on a connection (lost, silent, damaged, out of turn), the answer is the same: a
new connection after a jittered, growing pause, and on from where the last one stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from edge_client.errors import ConfigurationError, RefusedError, UnreachableError
from edge_client.identity import Identity
from edge_client.line import ComeBackError, Line, Traffic
from edge_client.transport import Dial, UntrustedError
from protocol import limits
from protocol.connection import default_hello
from protocol.errors import ErrorCode, RemoteProtocolError
from protocol.federation import FederationSettings
from protocol.link import LinkClosedError
from protocol.messages import (
    Assignment,
    Challenge,
    CheckIn,
    Chunk,
    Fetch,
    Finished,
    Goodbye,
    Hello,
    Join,
    Joined,
    Metric,
    NameOrNone,
    Receipt,
    Report,
    Resume,
    RetryWindow,
    Token,
)
from protocol.scalars import SchemaError
from protocol.schema import kind_of
from protocol.signing import UNSIGNED, join_statement, report_statement
from protocol.tensors import NamedTensors, Payload
from protocol.transfer import Receiver, chunks

log = logging.getLogger("pf2lora.client")

BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 60.0
# A coordinator that is busy says when to come back; it is there, so this is no failure to reach it.
_BUSY: Final = (ErrorCode.BUSY, ErrorCode.DRAINING)
# Before the first answer a wrong address is likelier than an outage: say so soon.
FIRST_CONTACT_PATIENCE_S: Final = 15.0
PATIENCE_S: Final = 24 * 3600.0
# A coordinator waits 20 s for a chunk of an update: this much comes in time over some 10 kbit/s.
UPLOAD_CHUNK_BYTES_MIN: Final = 16 * limits.KIB


@dataclass(frozen=True, slots=True)
class Offer:
    """What a device says of itself at a check-in."""

    fingerprint: str
    examples: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class FinishedReport:
    """The result of an assignment, as it will be sent."""

    assignment: str
    round: int
    base_version: bytes
    examples: int
    metrics: tuple[Metric, ...]
    update: NamedTensors


class Worker(Protocol):
    """The device behind the session: trains when asked, remembers what must not be lost."""

    async def prepare(self, settings: FederationSettings) -> None:
        """Make ready for this federation; called at every connection, so quick the second time."""

    def offer(self) -> Offer:
        """What to say at the next check-in."""

    def held(self, digest: bytes) -> NamedTensors | None:
        """The payload of this digest, if it is on the device already."""

    def unsent(self) -> FinishedReport | None:
        """The report that has no receipt yet, also from before a restart."""

    async def train(self, assignment: Assignment, base: NamedTensors) -> FinishedReport:
        """Do the assignment; the report is remembered before this returns."""

    async def settled(self, receipt: Receipt) -> None:
        """The report has its receipt and may be forgotten."""

    async def finish(self, base: NamedTensors, rounds: int) -> None:
        """No rounds are left; this is the final common adapter."""


def _unwatched(error: Exception) -> None:
    pass


def check_joining(federation: str, token: str) -> None:
    """Look at what a Join will say, before anybody is asked.

    Raises:
        ConfigurationError: it is no name of a federation, or no token; a token is a secret, and not
            repeated.
    """
    for field, text, kind, right in (
        ("federation", federation, NameOrNone, "the name in its federation.toml"),
        ("token", token, Token, "what `devices token` printed, without spaces or line end"),
    ):
        try:
            kind_of(kind).encode(text, field)
        except SchemaError:
            raise ConfigurationError(field, "is none", right) from None


class Session:
    """Takes part in a federation until its rounds are over.

    `troubled` is told of everything that ends a connection early, before the pause after it;
    `collect` makes what takes in a download; `traffic` counts on, over several sessions.
    """

    def __init__(
        self,
        dial: Dial,
        worker: Worker,
        *,
        federation: str,
        identity: Identity,
        rng: random.Random,
        token: str = "",
        patience_s: float = PATIENCE_S,
        first_contact_patience_s: float | None = None,
        troubled: Callable[[Exception], None] = _unwatched,
        collect: Callable[[Payload], Receiver] = Receiver,
        traffic: Traffic | None = None,
    ) -> None:
        self._dial = dial
        self._troubled = troubled
        self._collect = collect
        self._worker = worker
        self._federation = federation
        self._identity = identity
        self._token = token
        self._rng = rng
        self._patience_s = patience_s
        self._first_contact_patience_s = first_contact_patience_s or FIRST_CONTACT_PATIENCE_S
        self._receiver: Receiver | None = None
        self._resumed: tuple[str, int] | None = None  # the last upload, and from which byte
        self._upload_chunk_bytes = limits.CHUNK_BYTES_DEFAULT
        self._failures = 0
        self._failing_since: float | None = None
        self._met = False
        self.traffic = traffic or Traffic()

    async def run(self) -> None:
        """Until the federation is finished.

        Raises:
            RefusedError: the coordinator will not have this device, for a reason that stays.
            UnreachableError: no coordinator answered for as long as patience lasts.
            LocalProtocolError: a bug here, which no other connection would mend.
        """
        while True:
            try:
                if await self._one_connection():
                    return
            except (LinkClosedError, RemoteProtocolError, TimeoutError) as error:
                if isinstance(error, RemoteProtocolError) and not error.code.retryable:
                    raise RefusedError(error.code.value, str(error)) from error
                self._troubled(error)
                await self._pause(error)

    async def _one_connection(self) -> bool:
        link = await self._dial()
        try:
            return await self._converse(Line(link, self.traffic))
        finally:
            await link.close()

    async def _converse(self, line: Line) -> bool:
        """True when the federation is finished, False to connect anew later."""
        await line.ask(default_hello("pf2lora-client"), Hello)
        challenge = await line.receive(Challenge)
        self._met = True
        joined = await line.ask(self._join(line, challenge), Joined)
        await self._worker.prepare(joined.settings)
        while True:
            report = self._worker.unsent()
            if report is not None:
                receipt = await self._send_report(line, report, joined.settings.name)
                await self._worker.settled(receipt)
                self._progressed()
            offer = self._worker.offer()
            answer = await line.ask(
                CheckIn(offer.fingerprint, offer.examples, offer.rank),
                Assignment,
                RetryWindow,
                Finished,
            )
            self._progressed()
            match answer:
                case Assignment():
                    # Without a name here, so that who trains may let the base version go.
                    await self._worker.train(answer, await self._payload(line, answer.payload))
                case RetryWindow(after_s, spread_s, reason):
                    log.info("told to come back later: %s", reason)
                    await line.send(Goodbye(""))
                    await asyncio.sleep(after_s + self._rng.random() * spread_s)
                    return False
                case Finished(rounds, _, payload):
                    await self._worker.finish(await self._payload(line, payload), rounds)
                    with contextlib.suppress(LinkClosedError):  # all is done without it
                        await line.send(Goodbye("finished"))
                    return True

    def _join(self, line: Line, challenge: Challenge) -> Join:
        join = Join(self._federation, self._identity.key, line.channel, self._token, UNSIGNED)
        statement = join_statement(join, challenge.nonce, line.connection.version)
        return replace(join, signature=self._identity.sign(statement))

    async def _payload(self, line: Line, payload: Payload) -> NamedTensors:
        held = self._worker.held(payload.digest)
        if held is not None:
            return held
        if self._receiver is None or self._receiver.payload != payload:
            self._receiver = self._collect(payload)
        receiver = self._receiver
        chunk = await line.ask(Fetch(payload.digest, receiver.offset), Chunk)
        receiver.accept(chunk)
        while not chunk.last:
            chunk = await line.receive(Chunk)
            receiver.accept(chunk)
        self._receiver = None
        return receiver.tensors()

    async def _send_report(self, line: Line, report: FinishedReport, federation: str) -> Receipt:
        message = Report(
            report.assignment,
            report.round,
            report.base_version,
            report.examples,
            report.metrics,
            report.update.payload(),
            UNSIGNED,
        )
        statement = report_statement(message, federation, self._identity.device)
        message = replace(message, signature=self._identity.sign(statement))
        reply = await line.ask(message, Resume, Receipt)
        if isinstance(reply, Receipt):
            return reply
        before, self._resumed = self._resumed, (report.assignment, reply.offset)
        if self._resumed == before:
            # Not one chunk came through: over a slow link the next would not either, in its time.
            half = self._upload_chunk_bytes // 2
            self._upload_chunk_bytes = max(UPLOAD_CHUNK_BYTES_MIN, half)
        chunk_bytes = min(self._upload_chunk_bytes, line.connection.chunk_bytes)
        for chunk in chunks(report.update.buffer, reply.offset, chunk_bytes):
            await line.send(chunk)
        receipt = await line.receive(Receipt)
        if before is None or before[0] != report.assignment:
            # In one go: it need not have been a slow link that broke an earlier one.
            twice = 2 * self._upload_chunk_bytes
            self._upload_chunk_bytes = min(limits.CHUNK_BYTES_DEFAULT, twice)
        return receipt

    def _progressed(self) -> None:
        self._failures = 0
        self._failing_since = None

    async def _pause(self, error: Exception) -> None:
        if isinstance(error, ComeBackError) and error.code in _BUSY:
            self._progressed()
        now = asyncio.get_running_loop().time()
        if self._failing_since is None:
            self._failing_since = now
        patience_s = self._patience_s if self._met else self._first_contact_patience_s
        if isinstance(error, UntrustedError) and not self._met:
            patience_s = -1.0  # a wrong authority or address, and no moment's trouble
        self._failures += 1
        if now - self._failing_since > patience_s:
            raise UnreachableError(str(error), self._failures) from error
        longest = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(self._failures, 10))
        pause_s = longest * (0.5 + 0.5 * self._rng.random())
        problem = f"connection failed ({error})"
        if isinstance(error, ComeBackError):
            problem = str(error)
            # Spread over as long again, so that those who were sent away together do not return so.
            pause_s = max(pause_s, error.retry_after_s * (1.0 + self._rng.random()))
        log.warning("%s; next try in %.1f s", problem, pause_s)
        await asyncio.sleep(pause_s)
