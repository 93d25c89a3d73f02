"""An admin port over a store, in a thread with a loop of its own."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from coordinator.admin.settings import AdminSettings
from coordinator.store.sql import SqlStore
from coordinator.watch import Watch


@dataclass
class AdminPort:
    """An open admin port."""

    watch: Watch
    loop: asyncio.AbstractEventLoop

    @property
    def port(self) -> int:
        assert self.watch.port is not None
        return self.watch.port

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
        """Status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return (
                answer.status,
                {k.lower(): v for k, v in answer.headers.items()},
                (answer.read().decode()),
            )
        finally:
            connection.close()

    def tell(self, *happenings: Any) -> None:
        """Let the watch see them, and write down what it saw."""

        async def see() -> None:
            for happening in happenings:
                self.watch.observe(happening)
            await self.watch.ledger.write()

        asyncio.run_coroutine_threadsafe(see(), self.loop).result(30)


@contextmanager
def admin_port(
    url: str,
    token: str = "",
    certificate: tuple[str, str] = ("", ""),
    problem: Callable[[], str | None] = lambda: None,
    federations: tuple[str, ...] = (),
) -> Iterator[AdminPort]:
    """An admin port on any loopback port."""
    opened: list[AdminPort] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        thread = ThreadPoolExecutor(1)

        async def run_blocking(call: Callable[[], Any]) -> Any:
            return await asyncio.get_running_loop().run_in_executor(thread, call)

        store = await run_blocking(lambda: SqlStore(url))
        watch = Watch(
            AdminSettings(), token, certificate, url, store.database, run_blocking, problem
        )
        await watch.begin(federations)
        watch.ready()
        opened.append(AdminPort(watch, asyncio.get_running_loop()))
        ready.set()
        await asyncio.to_thread(stop.wait)
        await watch.end()
        await run_blocking(store.close)
        thread.shutdown()

    server = threading.Thread(target=lambda: asyncio.run(serve()))
    server.start()
    try:
        assert ready.wait(30)
        yield opened[0]
    finally:
        stop.set()
        server.join()
