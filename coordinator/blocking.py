"""How what runs on the event loop calls the store, which blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class RunBlocking(Protocol):
    """Runs a blocking call away from the event loop; in simulations, at once."""

    async def __call__(self, call: Callable[[], Result]) -> Result: ...


class StoreCalls:
    """Makes the store's calls that are about one federation."""

    def __init__(self, federation: str, run_blocking: RunBlocking) -> None:
        self._federation = federation
        self._run_blocking = run_blocking

    async def __call__(self, call: Callable[..., Result], *args: Any) -> Result:
        """Make one; the federation's name goes before its other arguments."""
        return await self._run_blocking(partial(call, self._federation, *args))
