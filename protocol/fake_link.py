"""A link in memory that loses, repeats and delays messages by a seed: for tests and simulations."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass

from protocol.link import LinkClosedError


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities a message, and the longest delay in seconds. Order is kept, as TCP does."""

    drop: float = 0.0
    duplicate: float = 0.0
    cut: float = 0.0
    delay_s: float = 0.0


class FakeLink:
    """One end of a pair; make both with `fake_links`."""

    def __init__(self, rng: random.Random, faults: Faults) -> None:
        self._rng = rng
        self._faults = faults
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._closed = False
        self._last_arrival = 0.0
        self.other: FakeLink
        self.sent: list[bytes] = []  # everything this end put on the wire
        self.channel = b""

    async def send(self, data: bytes) -> None:
        if self._closed:
            raise LinkClosedError("closed")
        self.sent.append(data)
        if self._rng.random() < self._faults.cut:
            await self.close()
            raise LinkClosedError("cut")
        copies = (self._rng.random() >= self._faults.drop) + (
            self._rng.random() < self._faults.duplicate
        )
        for _ in range(copies):
            self._deliver(data)
        await asyncio.sleep(0)

    async def receive(self) -> bytes:
        data = None if self._closed else await self._inbox.get()
        if data is None:
            self._closed = True
            raise LinkClosedError("closed")
        return data

    async def close(self) -> None:
        self._closed = True
        self._deliver(None)
        self._inbox.put_nowait(None)

    def _deliver(self, data: bytes | None) -> None:
        loop = asyncio.get_running_loop()
        arrival = loop.time() + self._rng.random() * self._faults.delay_s
        # Later than the last by the least there is: timers of one moment keep no order.
        self._last_arrival = max(math.nextafter(self._last_arrival, math.inf), arrival)
        loop.call_at(self._last_arrival, self.other._inbox.put_nowait, data)


def fake_links(rng: random.Random, faults: Faults | None = None) -> tuple[FakeLink, FakeLink]:
    """Two joined ends."""
    one, two = FakeLink(rng, faults or Faults()), FakeLink(rng, faults or Faults())
    one.other, two.other = two, one
    return one, two
