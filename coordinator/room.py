"""Memory for transfers: given out first come, first served, and by turns when it is short.

What all devices together may make the coordinator hold is one number, whatever their count. Who
finds no room waits a while and is then told to come back; who is slow while others wait goes on
later from where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

# Less than a device waits for an answer (edge_client/session.py).
WAIT_S: Final = 30.0
TURN_S: Final = 20.0


class NoRoomError(Exception):
    """Nothing became free for as long as one waits."""


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
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

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
        self._waiting.append((wanted, turn))
        try:
            async with asyncio.timeout(WAIT_S):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # given and given up in the same moment
                self._leave(wanted)
            else:
                self._waiting.remove((wanted, turn))
                self._let_in()
            if isinstance(error, TimeoutError):
                raise NoRoomError from None
            raise
        return True

    def _leave(self, size_bytes: int) -> None:
        self._used_bytes -= size_bytes
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._used_bytes + self._waiting[0][0] <= self._bytes_max:
            wanted, turn = self._waiting.popleft()
            self._used_bytes += wanted
            turn.set_result(None)
