"""What changes, as server-sent events: one reader of the store, however many look on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from coordinator.errors import StoreError

LOOK_EVERY_S: Final = 1.0
# A comment now and then tells a lost link from a quiet federation.
QUIET_MAX_S: Final = 15.0
LISTENERS_MAX: Final = 64

ReadFederations = Callable[[], Awaitable[list[dict[str, Any]]]]


class Live:
    """Looks at the federations once a second while anyone listens."""

    def __init__(self, read: ReadFederations, look_every_s: float = LOOK_EVERY_S) -> None:
        self._read = read
        self._look_every_s = look_every_s
        self._latest = ""
        self._changed = asyncio.Condition()
        self._listeners = 0
        self._looking: asyncio.Task[None] | None = None
        self._ended = False

    @property
    def is_full(self) -> bool:
        return self._listeners >= LISTENERS_MAX

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, each the federations as /api/federations gives them."""
        self._listeners += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        seen = ""
        try:
            while not self._ended:
                if self._latest and self._latest != seen:
                    seen = self._latest
                    yield f"data: {seen}\n\n"
                elif not await self._anything_new(seen):
                    yield ": still here\n\n"
        finally:
            self._listeners -= 1
            if not self._listeners and self._looking:
                self._looking.cancel()
                self._looking = None

    async def end(self) -> None:
        """Let all listeners go."""
        self._ended = True
        if self._looking:
            self._looking.cancel()
        async with self._changed:
            self._changed.notify_all()

    async def _anything_new(self, seen: str) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(QUIET_MAX_S), self._changed:
                await self._changed.wait_for(lambda: self._ended or self._latest != seen)
                return True
        return False

    async def _look(self) -> None:
        while True:
            with contextlib.suppress(StoreError):  # /readyz tells of it; the next look may do
                latest = json.dumps(await self._read())
                if latest != self._latest:
                    async with self._changed:
                        self._latest = latest
                        self._changed.notify_all()
            await asyncio.sleep(self._look_every_s)
