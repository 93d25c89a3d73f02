"""How what runs on the event loop calls the store, which blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from coordinator.store.base import Store

Result = TypeVar("Result")


class _Closed(Protocol):
    def close(self) -> None: ...


Opened = TypeVar("Opened", bound=_Closed)


class RunBlocking(Protocol):
    """Runs a blocking call away from the event loop; in simulations, at once."""

    async def __call__(self, call: Callable[[], Result]) -> Result: ...


class ReadAside(Protocol):
    """Has something read the store for long, while its other calls go on."""

    async def __call__(self, read: Callable[[Store], Result]) -> Result: ...


class StoreCalls:
    """Makes the store's calls that are about one federation."""

    def __init__(self, federation: str, run_blocking: RunBlocking, read_aside: ReadAside) -> None:
        self._federation = federation
        self._run_blocking = run_blocking
        self.aside = read_aside

    async def __call__(self, call: Callable[..., Result], *args: Any) -> Result:
        """Make one; the federation's name goes before its other arguments."""
        return await self._run_blocking(partial(call, self._federation, *args))


class Reader(Generic[Opened]):
    """A thread that reads over a connection of its own, which it opens when it is first asked."""

    def __init__(self, name: str, opened: Callable[[], Opened]) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._open = opened
        self._opened: Opened | None = None

    async def __call__(self, read: Callable[[Opened], Result]) -> Result:
        """What `read` makes of it; one after the other."""
        return await self._run(partial(self._read, read))

    async def close(self) -> None:
        """Wait for what is being read, then let go of it."""
        await self._run(self._close)
        self._thread.shutdown()

    def _read(self, read: Callable[[Opened], Result]) -> Result:
        if self._opened is None:
            self._opened = self._open()
        return read(self._opened)

    def _close(self) -> None:
        if self._opened:
            self._opened.close()

    async def _run(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
