"""Memory for transfers: given out first come, first served, and by turns when it is short.

What all devices together may make the coordinator hold is one number, whatever their count. Who
finds no room waits a while and is then told to come back; who is slow while others wait goes on
later from where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

# Less than a device waits for an answer (edge_client/session.py), and not much less: to wait costs
# a connection that is there, to come back a new one with all its proofs.
WAIT_S: Final = 70.0
TURN_S: Final = 20.0


# For the next try of who has found none; the more were before it, the later, and not all at once.
RETRY_AFTER_S: Final = 5.0
RETRY_AFTER_MAX_S: Final = 600.0
# Devices spread what they are told over as long again.
_TOLD: Final = 2 / 3


class NoRoomError(Exception):
    """Nothing became free for as long as one waits; `retry_after_s` is when something should."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("too many transfers")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Place:
    """Memory that a transfer has; `waited` tells whether it was to be had at once."""

    room: Room
    since: float
    waited: bool

    @property
    def turn_is_over(self) -> bool:
        """Whether others wait for what this transfer has had for long."""
        return self.room.is_wanted and asyncio.get_running_loop().time() > self.since + TURN_S


class Room:
    """So many bytes; a transfer that is larger than all of them has them to itself."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._used_bytes = 0
        # Who waits, each for so many bytes, in the order of their coming.
        self._waiting: OrderedDict[asyncio.Future[None], int] = OrderedDict()
        self._let_in_count = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    @contextlib.asynccontextmanager
    async def place(self, size_bytes: int) -> AsyncIterator[Place]:
        """Memory of this size while the context lasts.

        Raises:
            NoRoomError: there was none for WAIT_S.
        """
        wanted = min(size_bytes, self._bytes_max)
        waited = await self._enter(wanted)
        try:
            yield Place(self, asyncio.get_running_loop().time(), waited)
        finally:
            self._leave(wanted)

    async def _enter(self, wanted: int) -> bool:
        if not self._waiting and self._used_bytes + wanted <= self._bytes_max:
            self._used_bytes += wanted
            return False
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ahead, let_in_before = len(self._waiting), self._let_in_count
        self._waiting[turn] = wanted
        try:
            async with asyncio.timeout(WAIT_S):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # given and given up in the same moment
                self._leave(wanted)
            else:
                self._waiting.pop(turn, None)  # if it has not been passed over already
                self._let_in()
            if isinstance(error, TimeoutError):
                raise NoRoomError(
                    _retry_after_s(ahead, self._let_in_count - let_in_before)
                ) from None
            raise
        return True

    def _leave(self, size_bytes: int) -> None:
        self._used_bytes -= size_bytes
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            turn, wanted = next(iter(self._waiting.items()))
            if not turn.cancelled():  # as where it gives up in this very moment
                if self._used_bytes + wanted > self._bytes_max:
                    return
                self._used_bytes += wanted
                self._let_in_count += 1
                turn.set_result(None)
            del self._waiting[turn]


def _retry_after_s(ahead: int, let_in: int) -> float:
    """When one that had so many ahead is to come back, as so many were let in while it waited.

    The others of them are sent away too, and come back before it.
    """
    wait_s = (ahead - let_in) * WAIT_S / max(1, let_in)
    return RETRY_AFTER_S + min(_TOLD * wait_s, RETRY_AFTER_MAX_S)
