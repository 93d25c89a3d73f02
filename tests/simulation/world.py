"""A federation in one thread on a virtual clock: real service, real sessions, fake links."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from coordinator.control import Control
from coordinator.enrolment import NEWCOMERS_MAX, Gate
from coordinator.errors import StoreError
from coordinator.fake_server import FakeServer
from coordinator.happenings import Happening, Said
from coordinator.roster import UPLOADS_BYTES_MAX, Roster
from coordinator.screening import Bounds
from coordinator.service import FederationService
from coordinator.store.base import Store
from coordinator.store.memory import MemoryStore
from edge_client.identity import Identity
from edge_client.session import FinishedReport, Offer, Session
from edge_client.splits import seeded
from protocol.errors import ErrorCode
from protocol.fake_link import FakeLink, Faults
from protocol.federation import (
    Backbone,
    FederationSettings,
    Rounds,
    Task,
    TaskKind,
    Weighting,
    WireDtype,
)
from protocol.link import Link, LinkClosedError
from protocol.messages import Assignment, Metric, Receipt, Refusal
from protocol.tensors import NamedTensors, TensorSpec
from protocol.virtual_time import at_once

Result = TypeVar("Result")
FINGERPRINT = "sha256:" + "a" * 64
START = NamedTensors.from_arrays(
    {
        "layer.A": np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 16),
        "layer.B": np.zeros((16, 4), np.float32),
    }
)


def settings(**rounds: Any) -> FederationSettings:
    return FederationSettings(
        "sim",
        Backbone("none", FINGERPRINT),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, ("a", "b")),
        rounds=Rounds(weighting=Weighting.EXAMPLES, **rounds),
    )


def _unharmed(update: NamedTensors) -> NamedTensors:
    return update


@dataclass
class FakeDevice:
    """A Worker whose training is a fixed function of device, round and base."""

    name: str
    dtype: WireDtype = WireDtype.FLOAT32
    training_s: float = 5.0
    fingerprint: str = FINGERPRINT
    claimed: int = 0  # examples in reports, where not those that it has
    damage: Callable[[NamedTensors], NamedTensors] = _unharmed
    trained: list[int] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    final: NamedTensors | None = None
    report: FinishedReport | None = None

    @property
    def identity(self) -> Identity:
        return Identity.named(self.name)

    @property
    def id(self) -> str:
        """As the coordinator knows it."""
        return self.identity.device

    @property
    def examples(self) -> int:
        return 10 + int(seeded(self.name).integers(90))

    async def prepare(self, settings: FederationSettings) -> None:
        pass

    def offer(self) -> Offer:
        return Offer(self.fingerprint, self.examples)

    def held(self, digest: bytes) -> NamedTensors | None:
        return None

    def unsent(self) -> FinishedReport | None:
        return self.report

    async def train(self, assignment: Assignment, base: NamedTensors) -> FinishedReport:
        self.trained.append(assignment.round)
        await asyncio.sleep(self.training_s)
        self.report = FinishedReport(
            assignment.assignment,
            assignment.round,
            assignment.base_version,
            self.claimed or self.examples,
            (Metric("loss", 1.0),),
            self.damage(self.update(assignment.round, base)),
        )
        return self.report

    def update(self, round_number: int, base: NamedTensors) -> NamedTensors:
        """What training this base version in this round gives."""
        flat = base.flat()
        noise = seeded(self.name, round_number).standard_normal(len(flat))
        update = (0.01 * noise - 0.1 * flat).astype(np.float32)
        specs = [TensorSpec(s.name, self.dtype, s.shape) for s in base.specs]
        return NamedTensors.from_flat(specs, update, self.dtype)

    async def settled(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)
        self.report = None

    async def finish(self, base: NamedTensors, rounds: int) -> None:
        self.final = base


class Crash(StoreError):
    """The coordinator dies here."""


class CrashingStore(MemoryStore):
    """Dies before or after writes, as a seed tells; what it has written stays."""

    def __init__(self, seed: int, probability: float) -> None:
        super().__init__()
        self._crash_rng = random.Random(seed)
        self._probability = probability
        self.crashes = 0

    def _maybe_crash(self) -> None:
        if self._crash_rng.random() < self._probability:
            self.crashes += 1
            raise Crash("here")

    def open_round(self, *arguments: Any) -> None:
        self._maybe_crash()
        super().open_round(*arguments)
        self._maybe_crash()

    def add_assignment(self, *arguments: Any) -> None:
        self._maybe_crash()
        super().add_assignment(*arguments)
        self._maybe_crash()

    def keep_reports(self, *arguments: Any) -> list[bool]:
        self._maybe_crash()
        kept = super().keep_reports(*arguments)
        self._maybe_crash()
        return kept

    def close_round(self, *arguments: Any) -> None:
        self._maybe_crash()
        super().close_round(*arguments)
        self._maybe_crash()


class Process:
    """What a coordinator's process can do to the disk: nothing more once it has been killed."""

    def __init__(self, writing_s: float) -> None:
        self.is_alive = True
        self._writing_s = writing_s

    async def run(self, call: Callable[[], Result]) -> Result:
        if self._writing_s:
            await asyncio.sleep(self._writing_s)
        if not self.is_alive:
            raise LinkClosedError("killed")
        return await at_once(call)


class World:
    """One coordinator that can be stopped and started, and links to it that fail by a seed."""

    def __init__(
        self,
        settings: FederationSettings,
        seed: int = 0,
        faults: Faults | None = None,
        store: Store | None = None,
        base: NamedTensors = START,
        is_open: bool = True,
        bounds: Bounds = Bounds(),  # noqa: B008 - it is frozen
    ) -> None:
        self.base = base
        self.settings = settings
        self.seed = seed
        self.rng = random.Random(seed)
        self.faults = faults or Faults()
        self.store = store or MemoryStore()
        self.writing_s = 0.0  # how long a call of the store takes
        self.clock_off_s = 0.0  # by how much the coordinator's clock is wrong
        self.uploads_bytes_max = UPLOADS_BYTES_MAX
        self.is_open = is_open
        self.newcomers_max = NEWCOMERS_MAX
        self.refusals: Counter[ErrorCode] = Counter()
        self.bounds = bounds
        self.service: FederationService | None = None
        self.device_ends: list[FakeLink] = []

    async def start(self) -> None:
        self._process = Process(self.writing_s)
        service = FederationService(
            self.settings,
            self.base,
            self.store,
            rng=random.Random(1),
            run_blocking=self._process.run,
            read_aside=lambda read: self._process.run(partial(read, self.store)),
            clock=self._wall_clock,
            bounds=self.bounds,
        )
        gate = Gate(
            self.store.devices,
            is_open=self.is_open,
            run_blocking=at_once,
            clock=asyncio.get_running_loop().time,
            newcomers_max=self.newcomers_max,
        )
        await service.open()
        self.server = FakeServer(service, Roster(self.uploads_bytes_max), gate, self._observe)
        self.service = service  # from now on it listens

    def _wall_clock(self) -> float:
        return asyncio.get_running_loop().time() + self.clock_off_s

    async def kill(self) -> None:
        """The coordinator is gone between two events; only the store remains."""
        if self.service:
            self._process.is_alive = False
            self.service.close()
            self.service = None
            await self.server.kill()

    async def restart_after_failures(self) -> None:
        """Start the coordinator anew whenever its store has failed; until cancelled."""
        while True:
            if self.service is not None:
                await asyncio.wait({self.service.failure})
                self.service.failure.exception()
            await self.kill()
            await asyncio.sleep(self.rng.random() * 5.0)
            with contextlib.suppress(Crash):
                await self.start()

    async def wish(self, control: Control, *, killed: bool = False) -> None:
        """The operator's, seen at once, or by the coordinator that is started after a kill."""
        self.store.set_wish("sim", control.wish)
        self.store.set_roll_back("sim", control.roll_back_to)
        if killed:
            await self.kill()
            await self.start()
        assert self.service is not None
        await self.service.look_at_control()

    def rounds_done(self) -> int:
        snapshot = self.store.load("sim")
        assert snapshot is not None
        return snapshot.rounds_done

    async def dial(self) -> Link:
        if self.service is None:
            raise LinkClosedError("nobody listens")
        link = self.server.dial(self.rng, self.faults)
        self.device_ends.append(link)
        return link

    def _observe(self, happening: Happening) -> None:
        match happening:
            case Said(message=Refusal(code=code)):
                self.refusals[code] += 1

    async def take_part(self, device: FakeDevice) -> None:
        await self.session(device).run()

    def session(self, device: FakeDevice) -> Session:
        return Session(
            self.dial,
            device,
            federation="sim",
            identity=device.identity,
            rng=random.Random(f"{self.seed}/{device.name}"),
            first_contact_patience_s=3600.0,
        )
