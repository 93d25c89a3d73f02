"""Work beside the loop is done to its end, whoever is cancelled."""

from __future__ import annotations

import asyncio
import threading

import pytest

from edge_client.aside import aside


def test_what_is_done_aside_is_waited_for_though_all_tasks_are_cancelled() -> None:
    """As `asyncio.run` cancels them at its end, those too that it did not begin itself."""
    may_end, is_over = threading.Event(), threading.Event()

    def work() -> None:
        may_end.wait(30)
        is_over.set()

    async def scenario() -> None:
        doing = asyncio.ensure_future(aside(work))
        await asyncio.sleep(0)
        for _ in range(2):
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.wait({doing}, timeout=0.01)
            assert not doing.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await doing
        assert is_over.is_set()

    asyncio.run(scenario())
