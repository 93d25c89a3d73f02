"""Keeps account of the devices of this process: what each is doing, its bytes, what it tells.

It hears happenings on the event loop and writes what is new into the store once a second, behind
the rounds' own writing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from coordinator.blocking import RunBlocking
from coordinator.errors import StoreError
from coordinator.events import CloseRound
from coordinator.happenings import Acted, Disconnected, Happening, Heard, Said
from coordinator.store.database import Database
from coordinator.store.sightings import (
    TOLD,
    DeviceState,
    Sighting,
    all_away,
    count_kept_again,
    sum_up_last_rounds,
    sum_up_round,
    write_sightings,
)
from protocol.messages import (
    Assignment,
    CheckIn,
    Finished,
    Joined,
    Metric,
    Receipt,
    ReceiptStatus,
    Refusal,
    Report,
    RetryWindow,
)

log = logging.getLogger("pf2lora.coordinator")

WRITE_EVERY_S: Final = 1.0
_GONE: Final = (DeviceState.RESTING, DeviceState.FINISHED, DeviceState.REFUSED)

_Name = tuple[str, str]  # federation, device
_Closed = tuple[str, int, int]  # federation, round, attempt


class Ledger:
    """An observer that remembers devices; `run` writes them down."""

    def __init__(
        self,
        database: Database,
        run_blocking: RunBlocking,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._run_blocking = run_blocking
        self._clock = clock
        self._states: dict[_Name, DeviceState] = {}  # of those that are connected
        self._links: Counter[_Name] = Counter()  # a device may have connected anew
        self._new: dict[_Name, Sighting] = {}
        self._told: dict[_Name, tuple[Metric, ...]] = {}  # in reports that have no receipt yet
        self._closed: list[_Closed] = []

    def __call__(self, happening: Happening) -> None:
        match happening:
            case Said(federation, device, Joined(), size):
                self._links[federation, device] += 1
                self._see((federation, device), DeviceState.WAITING).received_bytes += size
            case Said(federation, device, message, size) if (federation, device) in self._states:
                self._said((federation, device), message, size)
            case Heard(federation, device, message, size) if (federation, device) in self._states:
                self._heard((federation, device), message, size)
            case Disconnected(federation, device) if (federation, device) in self._states:
                self._left((federation, device))
            case Acted(federation, CloseRound(number, attempt, _), _):
                self._closed.append((federation, number, attempt))
            case _:
                pass

    def connected(self) -> Counter[tuple[str, DeviceState]]:
        """How many of the connected devices are in which federation and state."""
        return Counter((name[0], state) for name, state in self._states.items())

    async def begin(self, federations: Sequence[str]) -> None:
        """Put in order what an earlier process left."""

        def put_in_order() -> None:
            with self._database.begin() as db:
                count_kept_again(db)
                all_away(db)
                for federation in federations:
                    sum_up_last_rounds(db, federation)

        await self._run_blocking(put_in_order)

    async def run(self) -> None:
        """Write down what is new, again and again; what cannot be written is told and let go."""
        while True:
            await asyncio.sleep(WRITE_EVERY_S)
            try:
                await self.write()
            except StoreError as error:
                log.error("what was seen of devices is not written: %s", error)

    async def write(self) -> None:
        """Write down what is new."""
        seen, self._new = self._new, {}
        closed, self._closed = self._closed, []
        if seen or closed:
            await self._run_blocking(partial(self._write, seen, closed))

    def _write(self, seen: dict[_Name, Sighting], closed: list[_Closed]) -> None:
        with self._database.begin() as db:
            write_sightings(db, seen)
            for federation, number, attempt in closed:
                sum_up_round(db, federation, number, attempt)

    def _said(self, name: _Name, message: object, size_bytes: int) -> None:
        state = self._states[name]
        match message:
            case Assignment(round=number):
                sighting = self._see(name, DeviceState.TRAINING)
                sighting.round = number
            case Receipt(status=status):
                sighting = self._see(name, DeviceState.WAITING)
                self._settle(name, sighting, status)
            case RetryWindow():
                sighting = self._see(name, DeviceState.RESTING)
            case Finished():
                sighting = self._see(name, DeviceState.FINISHED)
            case Refusal() if self._links[name] == 1:
                sighting = self._see(name, DeviceState.REFUSED)
            case _:
                sighting = self._see(name, state)
        sighting.received_bytes += size_bytes

    def _heard(self, name: _Name, message: object, size_bytes: int) -> None:
        sighting = self._see(name, self._states[name])
        sighting.sent_bytes += size_bytes
        match message:
            case CheckIn(examples=examples):
                sighting = self._see(name, DeviceState.WAITING)
                sighting.examples = examples
            case Report(metrics=metrics):
                self._see(name, DeviceState.SENDING)
                self._told[name] = metrics

    def _settle(self, name: _Name, sighting: Sighting, status: ReceiptStatus) -> None:
        metrics = self._told.pop(name, None)
        if status is ReceiptStatus.ACCEPTED:
            sighting.kept += 1
            if metrics is not None:
                told = {metric.name: metric.value for metric in metrics}
                sighting.told = {key: told[key] for key in TOLD if key in told}
        elif status is ReceiptStatus.REJECTED:
            sighting.rejected += 1
        elif status is ReceiptStatus.LATE:
            sighting.late += 1

    def _left(self, name: _Name) -> None:
        self._links[name] -= 1
        if self._links[name]:
            return
        del self._links[name]
        state = self._states[name]
        self._see(name, state if state in _GONE else DeviceState.AWAY)
        self._told.pop(name, None)
        del self._states[name]

    def _see(self, name: _Name, state: DeviceState) -> Sighting:
        self._states[name] = state
        sighting = self._new.setdefault(name, Sighting(state, 0.0))
        sighting.state, sighting.seen_at = state, self._clock()
        return sighting
