"""A listening end without sockets: real sessions over fake links, for tests and simulations."""

from __future__ import annotations

import asyncio
import random

from coordinator.enrolment import Gate
from coordinator.federations import Federations
from coordinator.happenings import Observer, unobserved
from coordinator.roster import Roster
from coordinator.service import FederationService
from coordinator.session import DeviceSession
from protocol.fake_link import FakeLink, Faults, fake_links


class FakeServer:
    """Takes connections for one federation, as server.py does over sockets."""

    def __init__(
        self,
        service: FederationService,
        roster: Roster,
        gate: Gate,
        observe: Observer = unobserved,
    ) -> None:
        self.roster = roster
        self._federations = Federations([service])
        self._gate = gate
        self._observe = observe
        self._sessions: set[asyncio.Task[None]] = set()

    def dial(self, rng: random.Random, faults: Faults | None = None) -> FakeLink:
        """The device's end of a new connection."""
        ours, theirs = fake_links(rng, faults)
        session = DeviceSession(theirs, self._federations, self.roster, self._gate, self._observe)
        task = asyncio.create_task(session.run())
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)
        return ours

    async def expel_barred(self) -> None:
        """Look once for devices that may not be here any more."""
        await self.roster.expel_barred(self._gate, self._federations)

    async def kill(self) -> None:
        """End every session where it stands."""
        for task in list(self._sessions):
            task.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)
