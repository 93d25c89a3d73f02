"""One connection of a session: its bytes are counted, and no answer is waited for too long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast, overload

from edge_client.errors import RefusedError
from protocol.connection import Connection, Role, default_hello
from protocol.errors import ErrorCode, ProtocolError
from protocol.link import Link, LinkClosedError
from protocol.messages import Message, Refusal

# Longer than a coordinator holds a waiting device, so that silence means a dead link.
REPLY_TIMEOUT_S: Final = 90.0
LAST_WORD_S: Final = 1.0

A = TypeVar("A", bound=Message)
B = TypeVar("B", bound=Message)
C = TypeVar("C", bound=Message)
Result = TypeVar("Result")


@dataclass(slots=True)
class Traffic:
    """Bytes of messages that went either way, over any number of connections."""

    sent_bytes: int = 0
    received_bytes: int = 0


class ComeBackError(LinkClosedError):
    """The coordinator ended the session and says after how many seconds to come back."""

    def __init__(self, code: ErrorCode, reason: str, retry_after_s: float) -> None:
        super().__init__(f"the coordinator said: {reason}")
        self.code = code
        self.retry_after_s = retry_after_s


class NoAnswerError(LinkClosedError):
    """The link is there, and nothing came over it for too long."""


class Line:
    """A connection's state machine on its link: one message out, the wanted one back."""

    def __init__(self, link: Link, traffic: Traffic) -> None:
        self.connection = Connection(Role.DEVICE, default_hello("pf2lora-client"))
        self.channel = link.channel
        self._link = link
        self._traffic = traffic

    async def send(self, message: Message) -> None:
        data = self.connection.send(message)
        self._traffic.sent_bytes += len(data)
        try:
            await self._in_time(self._link.send(data))
        except LinkClosedError:
            await self._last_word()
            raise

    async def _last_word(self) -> None:
        """Raise what the coordinator said before the link closed, such as when to return."""
        with contextlib.suppress(TimeoutError, ProtocolError):
            async with asyncio.timeout(LAST_WORD_S):
                await self._receive_any(())

    @overload
    async def ask(self, message: Message, a: type[A], /) -> A: ...
    @overload
    async def ask(self, message: Message, a: type[A], b: type[B], /) -> A | B: ...
    @overload
    async def ask(self, message: Message, a: type[A], b: type[B], c: type[C], /) -> A | B | C: ...

    async def ask(self, message: Message, *wanted: type[Any]) -> Any:
        """Send a message and wait for one of the wanted kinds."""
        await self.send(message)
        return await self._receive_any(wanted)

    async def receive(self, wanted: type[A]) -> A:
        """Wait for a message of the wanted kind."""
        message = await self._receive_any((wanted,))
        return cast(A, message)

    async def _receive_any(self, wanted: tuple[type[Any], ...]) -> Message:
        data = await self._in_time(self._link.receive())
        self._traffic.received_bytes += len(data)
        message = self.connection.receive(data)
        if type(message) in wanted:
            return message
        if isinstance(message, Refusal) and not message.code.retryable:
            raise RefusedError(message.code.value, message.reason)
        if isinstance(message, Refusal):
            raise ComeBackError(message.code, message.reason, message.retry_after_s)
        reason = getattr(message, "reason", "") or type(message).__name__
        raise LinkClosedError(f"the coordinator said: {reason}")

    async def _in_time(self, doing: Awaitable[Result]) -> Result:
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                return await doing
        except TimeoutError:
            raise NoAnswerError(f"no answer for {REPLY_TIMEOUT_S:g} s") from None
