"""Runs a load test: devices begin at a rate, take part, and end together."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from edge_client.errors import RefusedError, UnreachableError
from edge_client.fleet.device import EnoughError, SimulatedDevice, kind_of
from edge_client.fleet.download import CheckedDownload
from edge_client.fleet.figures import Figures
from edge_client.fleet.plan import Plan
from edge_client.fleet.updates import Aside, MadeUpUpdates
from edge_client.identity import Identity
from edge_client.session import Session
from edge_client.transport import Dial

LAG_EVERY_S: Final = 0.1
TICK_EVERY_S: Final = 1.0
# The first device is alone, and gives up as soon as any would. The others stand in a crowd.
FIRST_PATIENCE_S: Final = 15.0
PATIENCE_S: Final = 120.0


class Fleet:
    """The devices of one test.

    Args:
        plan: what they do.
        dial: how they reach the coordinator.
        federation: its name, as the coordinator knows it.
        tokens: one a device, where keys must be enrolled.
        tick: called about once a second while the test runs.
        aside: how updates are made off the event loop.
    """

    def __init__(
        self,
        plan: Plan,
        dial: Dial,
        federation: str,
        *,
        tokens: Sequence[str] = (),
        tick: Callable[[], None] = lambda: None,
        aside: Aside = asyncio.to_thread,
    ) -> None:
        self.figures = Figures()
        self.stopping = asyncio.Event()
        self._plan = plan
        self._dial = dial
        self._federation = federation
        self._tokens = tokens
        self._tick = tick
        self._updates = MadeUpUpdates(plan.seed, aside)

    async def run(self) -> None:
        """Until rounds or time are over, no device is left, or `stopping` is set."""
        stopped = asyncio.create_task(self.stopping.wait())
        watching = asyncio.create_task(self._watch())
        devices = asyncio.create_task(self._all())
        tasks: tuple[asyncio.Task[Any], ...] = (stopped, watching, devices)
        try:
            done, _ = await asyncio.wait(
                tasks, timeout=self._plan.run_time_s, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done - {stopped}:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as group:
            first = self._device(0)
            leading = group.create_task(self._take_part(first, 0, FIRST_PATIENCE_S))
            heard = group.create_task(first.heard.wait())
            await asyncio.wait({leading, heard}, return_when=asyncio.FIRST_COMPLETED)
            if not heard.done():  # where one is refused, or finds nobody, so would all be
                heard.cancel()
                return
            clock = asyncio.get_running_loop()
            began_at = clock.time()
            for number in range(1, self._plan.devices):
                due_at = began_at + number / self._plan.spawn_rate
                await asyncio.sleep(max(0.0, due_at - clock.time()))
                group.create_task(self._take_part(self._device(number), number, PATIENCE_S))

    def _device(self, number: int) -> SimulatedDevice:
        return SimulatedDevice(number, self._plan, self._dial, self.figures, self._updates)

    async def _take_part(self, device: SimulatedDevice, number: int, patience_s: float) -> None:
        session = Session(
            device.dial,
            device,
            federation=self._federation,
            identity=Identity.named(device.name),
            rng=random.Random(f"{device.name}/session"),
            token=self._tokens[number] if self._tokens else "",
            first_contact_patience_s=patience_s,
            troubled=device.troubled,
            collect=CheckedDownload,
        )
        try:
            await session.run()
        except RefusedError as error:
            self.figures.failed(kind_of(error), str(error))
        except (UnreachableError, EnoughError):
            pass  # of the former every attempt has been counted
        finally:
            self.figures.under_way.discard(device.name)

    async def _watch(self) -> None:
        """Note how late the event loop is, tick, and return when the rounds wanted are done."""
        clock = asyncio.get_running_loop()
        tick_at = clock.time() + TICK_EVERY_S
        while not self._rounds_are_done():
            due_at = clock.time() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            self.figures.took("lag", max(0.0, clock.time() - due_at))
            if clock.time() >= tick_at:
                self._tick()
                tick_at += TICK_EVERY_S

    def _rounds_are_done(self) -> bool:
        if self._plan.rounds is None or self.figures.rounds < self._plan.rounds:
            return False
        return not self.figures.under_way
