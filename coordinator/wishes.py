"""What the operator has written into the store, as events for the round machine."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

from coordinator.blocking import StoreCalls
from coordinator.control import Control
from coordinator.errors import StoreError
from coordinator.events import AskedBack, Event, Wished
from coordinator.log import FederationLog
from coordinator.store.base import Store

log = logging.getLogger("pf2lora.coordinator")


class Wishes:
    """The operator's, for one federation; RUN until another is found."""

    def __init__(self, federation: str, store: Store, call: StoreCalls) -> None:
        self._store = store
        self._call = call
        self._log = FederationLog(log, federation)
        self._control = Control()

    async def news(self) -> AsyncIterator[Event]:
        """What has changed since the last look; each is to be obeyed before the next is asked."""
        control = await self._call(self._store.control)
        before, self._control = self._control, control
        if control.wish is not before.wish:
            self._log.info("the operator's wish: %s", control.wish.value)
            yield Wished(control.wish)
        if control.roll_back_to is None:
            return
        problem = await self._obstacle(control.roll_back_to)
        if problem is None:
            yield AskedBack(control.roll_back_to)
        else:
            # Let go of before anything has changed: the rounds go on, now and after a restart.
            self._log.error("cannot roll back to round %d: %s", control.roll_back_to, problem)
            await self._call(self._store.set_roll_back, None)

    async def _obstacle(self, number: int) -> str | None:
        try:
            base = await self._call(self._store.base_after, number)
        except StoreError as error:
            return str(error)
        return "not kept any more" if base is None else None
