"""Work beside the event loop, which must never wait for a step that is long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def aside(do: Callable[[], Result], unwanted: threading.Event | None = None) -> Result:
    """Do it in a thread, and to its end however often this is cancelled.

    So nobody lets go of the state folder while it is still at work there. asyncio.run waits for a
    thread too, but from Python 3.12 on for five minutes alone. What is long may look at `unwanted`,
    which is set when this is cancelled, and end early by raising asyncio.CancelledError.
    """
    # No task, which the loop's end would cancel as well.
    doing = asyncio.get_running_loop().run_in_executor(None, do)
    cancelled: asyncio.CancelledError | None = None
    while not doing.done():
        try:
            await asyncio.wait({doing})
        except asyncio.CancelledError as error:
            cancelled = error
            if unwanted is not None:
                unwanted.set()
    result = doing.result()
    if cancelled is not None:
        raise cancelled
    return result


def has_event_loop() -> bool:
    """Whether this thread runs one, which nothing that blocks may keep from turning."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
