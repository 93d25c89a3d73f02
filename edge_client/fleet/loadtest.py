"""A load test from its beginning to its report, of a coordinator that runs or of one of its own."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edge_client.fleet.figures import Figures
from edge_client.fleet.load import Fleet
from edge_client.fleet.meter import Meter, saturation
from edge_client.fleet.own_coordinator import NAME, OwnCoordinator, Shape
from edge_client.fleet.plan import Plan
from edge_client.fleet.report import MIB
from edge_client.tls import TlsFiles
from edge_client.transport import websocket_dial


@dataclass(frozen=True, slots=True)
class Theirs:
    """A coordinator that runs already, and the federation there that is to be spoilt."""

    address: str
    federation: str
    tls: TlsFiles = TlsFiles()  # noqa: RUF009 - it is frozen
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Own:
    """A coordinator for this test alone.

    `settings` are its own by dotted key; its store is in a new folder in `folder`.
    """

    shape: Shape = Shape()  # noqa: RUF009 - it is frozen
    settings: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a test found: values by name, and what should be known of them."""

    values: Mapping[str, float | None]
    figures: Figures
    notes: tuple[str, ...]
    failure: str | None = None


# Told of a row of the history, once a second.
Tell = Callable[[Mapping[str, float]], None]


async def run_load_test(plan: Plan, target: Theirs | Own, tell: Tell = lambda _: None) -> Outcome:
    """Run it to its end; SIGINT and SIGTERM end it early, and a second one at once.

    Raises:
        ConfigurationError: the coordinator's address or settings cannot be used.
        CoordinatorEndedError: a coordinator of the test's own did not start.
    """
    if isinstance(target, Theirs):
        return await _run(plan, target, None, tell)
    with tempfile.TemporaryDirectory(prefix="pf2lora-loadtest-", dir=target.folder) as folder:
        own = await OwnCoordinator.started(Path(folder), plan, target.shape, target.settings)
        try:
            return await _run(plan, Theirs(own.address, NAME), own, tell)
        finally:
            await own.stop()


async def _run(plan: Plan, target: Theirs, own: OwnCoordinator | None, tell: Tell) -> Outcome:
    meter = Meter()
    fleet = Fleet(
        plan,
        websocket_dial(target.address, target.tls),
        target.federation,
        tokens=target.tokens,
        tick=lambda: tell(_row(fleet.figures, meter)),
    )
    cost = _Cost(own)
    noting = asyncio.create_task(cost.note_when(fleet.figures.began))
    async with _ended_by_signals(fleet.stopping):
        failure = await _to_the_end(fleet, own)
    noting.cancel()
    values = {"devices": plan.devices} | fleet.figures.values() | meter.values(plan.devices)
    values |= cost.values(fleet.figures.accepted)
    # Either there are times that its own limits may have spoilt, or none to speak of.
    note = _why_nothing(fleet.figures) or saturation(values["load_cpu_share"] or 0.0, fleet.figures)
    notes = (note,) if note else ()
    return Outcome(values, fleet.figures, notes, failure)


async def _to_the_end(fleet: Fleet, own: OwnCoordinator | None) -> str | None:
    """Run the fleet; why it could not be run to its end, if so."""
    running = asyncio.create_task(fleet.run())
    if own is None:
        await running
        return None
    ended = asyncio.create_task(own.ended())
    try:
        await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
            return None
        fleet.stopping.set()
        await running
        return str(ended.exception())
    finally:
        ended.cancel()


class _Cost:
    """What a coordinator of the test's own takes, from the first assignment on."""

    def __init__(self, own: OwnCoordinator | None) -> None:
        self._own = own
        self._cpu_s: float | None = None
        self._idle_bytes = own.resident_bytes() if own else None
        self._connected_bytes: int | None = None

    async def note_when(self, began: asyncio.Event) -> None:
        await began.wait()
        if self._own:
            self._cpu_s = self._own.cpu_s()
            self._connected_bytes = self._own.resident_bytes()

    def values(self, accepted: int) -> dict[str, float | None]:
        if self._own is None:
            return {}
        cpu_s = self._own.cpu_s()
        found: dict[str, float | None] = {"coordinator_cpu_ms_per_update": None}
        if cpu_s is not None and self._cpu_s is not None and accepted:
            found["coordinator_cpu_ms_per_update"] = 1e3 * (cpu_s - self._cpu_s) / accepted
        sizes = {
            "idle": self._idle_bytes,
            "connected": self._connected_bytes,
            "peak": self._own.resident_bytes(peak=True),
        }
        for name, size_bytes in sizes.items():
            found[f"coordinator_{name}_mib"] = None if size_bytes is None else size_bytes / MIB
        return found


def _row(figures: Figures, meter: Meter) -> dict[str, float]:
    return {
        "seconds": meter.seconds,
        "connected": figures.connected,
        "rounds": figures.rounds,
        "accepted": figures.accepted,
        "late": figures.late,
        "rejected": figures.rejected,
        "errors": figures.error_count,
        "updates_per_second": figures.updates_per_second,
        "sent_bytes": figures.sent_bytes,
        "received_bytes": figures.received_bytes,
        **figures.lately(),
    }


def _why_nothing(figures: Figures) -> str | None:
    if figures.accepted:
        return None
    if figures.finished:
        return "the federation's rounds are over: there was nothing to do"
    if not figures.joined:
        return "no device was let in"
    return "no report was accepted" if figures.assignments else "no device was asked in a round"


@asynccontextmanager
async def _ended_by_signals(stopping: asyncio.Event) -> AsyncIterator[None]:
    """The first SIGINT or SIGTERM sets `stopping`; from then on they do what they always do."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        stopping.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
