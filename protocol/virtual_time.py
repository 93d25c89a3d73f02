"""An event loop whose clock is its own: for tests and simulations of federations in one thread.

Hours pass in no time, and alike every time: instead of waiting, time jumps to what comes next.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _NoWaiting(selectors.SelectSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("the simulation is stuck: nothing will ever happen again")
        self.loop.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` is what has been slept, not what has passed."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _NoWaiting()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def simulate(scenario: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run a scenario to its end on a virtual clock.

    Raises:
        ExceptionGroup: of tasks that failed and that nobody has looked at.
    """
    unseen: list[Exception] = []

    def take(_: asyncio.AbstractEventLoop, told: dict[str, Any]) -> None:
        unseen.append(told.get("exception") or RuntimeError(told["message"]))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.get_loop().set_exception_handler(take)
        result = runner.run(scenario())
    if unseen:
        raise ExceptionGroup("nobody has looked at these", unseen)
    return result


async def at_once(call: Callable[[], Result]) -> Result:
    """Do blocking work without leaving the thread."""
    return call()
