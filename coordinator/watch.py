"""All that watches a coordinator: the ledger, the metrics, the admin port, systemd's watchdog."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from starlette.applications import Starlette

from coordinator.admin.app import Sources, admin_app
from coordinator.admin.live import Live
from coordinator.admin.server import AdminServer
from coordinator.admin.settings import AdminSettings
from coordinator.blocking import Reader, RunBlocking
from coordinator.errors import StoreError
from coordinator.happenings import all_of
from coordinator.ledger import Ledger
from coordinator.metrics import Metrics
from coordinator.store import views
from coordinator.store.database import Database
from coordinator.systemd import READY, STOPPING, ServiceManager
from protocol.link import authority

log = logging.getLogger("pf2lora.coordinator")

STORE_ANSWER_S: Final = 5.0

Result = TypeVar("Result")


class Watch:
    """Observes from the beginning; `begin` opens the admin port, `end` closes it.

    Args:
        settings, token: of the admin port.
        certificate: its PEM file and that of its key, to speak TLS with; empty for none.
        store_url, database: the store; the admin port reads it over a connection of its own.
        run_blocking: of the store's thread.
        problem: why the coordinator cannot serve devices, if it cannot.
    """

    def __init__(
        self,
        settings: AdminSettings,
        token: str,
        certificate: tuple[str, str],
        store_url: str,
        database: Database,
        run_blocking: RunBlocking,
        problem: Callable[[], str | None],
    ) -> None:
        self._settings = settings
        self._token = token
        self._certificate = certificate
        self._problem = problem
        self.ledger = Ledger(database, run_blocking)
        self._metrics = Metrics(self.ledger.connected)
        self.observe = all_of(self.ledger, self._metrics)
        self._live = Live(self._federations)
        self._manager = ServiceManager()
        self._reader = Reader("admin", lambda: Database(store_url, create=False))
        self._is_ready = False
        self._tasks: list[asyncio.Task[None]] = []
        self._server: AdminServer | None = None
        self.app: Starlette | None = None

    @property
    def address(self) -> str | None:
        """The dashboard's, if the admin port is open."""
        scheme = "https" if any(self._certificate) else "http"
        if self._server is None:
            return None
        return f"{scheme}://{authority(self._settings.host, self._server.port)}/"

    @property
    def port(self) -> int | None:
        """The admin port in use, if it is open."""
        return self._server.port if self._server else None

    async def begin(self, federations: Sequence[str]) -> None:
        """Watch a coordinator of these federations.

        Raises:
            AddressError: the admin address cannot be listened on.
        """
        if self._settings.enabled:
            sources = Sources(self._read, self._live, self._metrics.render, self._problems)
            self.app = admin_app(sources, self._token)
            host, port = self._settings.host, self._settings.port
            self._server = AdminServer(self.app, host, port, *self._certificate)
            self._server.open()
        await self.ledger.begin(federations)
        watching: list[Awaitable[None]] = [
            self.ledger.run(),
            self._metrics.measure_lag(),
            self._manager.keep_alive(),
        ]
        self._tasks = [asyncio.ensure_future(one) for one in watching]

    def certificate_expires(self, at: datetime) -> None:
        """Until when the certificate is good that devices are shown."""
        self._metrics.certificate_expires.set(at.timestamp())

    def ready(self) -> None:
        """Devices are served from now on."""
        self._is_ready = True
        self._manager.tell(READY)

    def stopping(self) -> None:
        """The coordinator has begun to stop."""
        self._manager.tell(STOPPING)

    async def end(self) -> None:
        """Write down the last of it; the store is still open."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._live.end()
        if self._server:
            await self._server.close()
        try:
            await self.ledger.write()
        except StoreError as error:
            log.error("what was seen of devices is not written: %s", error)
        await self._reader.close()

    async def _read(self, view: Callable[[sa.Connection], Result]) -> Result:
        def read(database: Database) -> Result:
            with database.begin() as db:
                return view(db)

        return await self._reader(read)

    async def _federations(self) -> list[dict[str, Any]]:
        found = await self._read(views.all_federations)
        return [views.as_json(one) for one in found]

    async def _problems(self) -> list[str]:
        if not self._is_ready:
            return ["the coordinator is starting"]
        problem = self._problem()
        problems = [problem] if problem else []
        try:
            async with asyncio.timeout(STORE_ANSWER_S):
                await self._read(lambda db: db.execute(sa.text("SELECT 1")))
        except (StoreError, TimeoutError) as error:
            problems.append(f"the store does not answer: {error}")
        return problems
