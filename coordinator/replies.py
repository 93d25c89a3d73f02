"""Questions of devices that are yet to be answered: one a device, that of its newest connection."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import UnionType

from protocol.link import LinkClosedError
from protocol.messages import Message


@dataclass(frozen=True, slots=True)
class _Question:
    reply: asyncio.Future[Message]
    kinds: type | UnionType  # of messages that answer it


class Replies:
    """Who waits for what."""

    def __init__(self) -> None:
        self._questions: dict[str, _Question] = {}

    def expect(self, device: str, kinds: type | UnionType) -> asyncio.Future[Message]:
        """The answer to come; whoever asked before for this device has a closed link."""
        older = self._questions.get(device)
        if older is not None and not older.reply.done():
            older.reply.set_exception(LinkClosedError("the device asks over a newer connection"))
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._questions[device] = _Question(reply, kinds)
        return reply

    def give(self, device: str, message: Message) -> None:
        """Answer a device; what answers only an older connection's question is nobody's."""
        question = self._questions.get(device)
        if question is None or not isinstance(message, question.kinds):
            return
        del self._questions[device]
        if not question.reply.done():
            question.reply.set_result(message)

    def forget(self, device: str) -> None:
        """Nobody waits any more."""
        question = self._questions.pop(device, None)
        if question is not None:
            question.reply.cancel()

    def fail(self, error: Exception) -> None:
        """Nobody will be answered any more."""
        for question in self._questions.values():
            if not question.reply.done():
                question.reply.set_exception(error)
                question.reply.exception()  # who asked may be gone
        self._questions.clear()
