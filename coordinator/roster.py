"""Who is here: the joined sessions of all federations, and what they share."""

from __future__ import annotations

import asyncio
from typing import Final

from coordinator.enrolment import Gate
from coordinator.errors import RefusedError
from coordinator.federations import Federations
from coordinator.rates import Buckets
from coordinator.refusals import Refusals
from coordinator.room import Room
from coordinator.session import DeviceSession
from protocol import limits
from protocol.errors import ErrorCode

UPLOADS_BYTES_MAX: Final = 48 * limits.MIB
DOWNLOADS_BYTES_MAX: Final = 24 * limits.MIB
# A device may connect as often at once as it may in so many seconds.
JOINS_BURST_S: Final = 100.0


class Roster:
    """The joined sessions, one a device and federation: a newer takes an older one's place.

    They share the memory for transfers, the count of how often each device connects, and what the
    log says of refusals.
    """

    def __init__(
        self,
        uploads_bytes_max: int = UPLOADS_BYTES_MAX,
        downloads_bytes_max: int = DOWNLOADS_BYTES_MAX,
        joins_s: float = 0.0,
    ) -> None:
        self._sessions: dict[tuple[str, str], DeviceSession] = {}
        self.uploads = Room(uploads_bytes_max)
        self.downloads = Room(downloads_bytes_max)
        clock = asyncio.get_running_loop().time
        self.joins = Buckets(joins_s, JOINS_BURST_S * joins_s, clock)
        self.refusals = Refusals()

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, session: DeviceSession) -> None:
        key = session.federation, session.device
        older = self._sessions.get(key)
        self._sessions[key] = session
        if older is not None:
            older.stop(RefusedError(ErrorCode.SUPERSEDED, "this device has connected anew"))

    def remove(self, session: DeviceSession) -> bool:
        """Forget a session; True if it was the device's present one."""
        key = session.federation, session.device
        if self._sessions.get(key) is not session:
            return False
        del self._sessions[key]
        return True

    async def expel_barred(self, gate: Gate, federations: Federations) -> None:
        """End the sessions of devices that may not be here; nobody waits for the absent ones."""
        barred = await gate.barred()
        for session in list(self._sessions.values()):
            if session.device in barred:
                session.expel(barred[session.device])
        for service in federations:
            for device in service.expected() & barred.keys():
                if (service.settings.name, device) not in self._sessions:
                    await service.expelled(device, str(barred[device]))
