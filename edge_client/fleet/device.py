"""One simulated device: a session's Worker that waits where others train, and its connections."""

from __future__ import annotations

import asyncio
import random

from edge_client.errors import RefusedError
from edge_client.fleet.figures import Figures
from edge_client.fleet.plan import Plan
from edge_client.fleet.updates import MadeUpUpdates
from edge_client.line import ComeBackError, NoAnswerError
from edge_client.session import FinishedReport, Offer
from edge_client.transport import Dial
from protocol.errors import ProtocolError, RemoteProtocolError
from protocol.federation import FederationSettings
from protocol.link import Link, LinkClosedError
from protocol.messages import Assignment, Metric, Receipt, ReceiptStatus
from protocol.tensors import NamedTensors

EXAMPLES = 100
ANY_BACKBONE = "sha256:" + "0" * 64


class DroppedOutError(LinkClosedError):
    """The device has cut its connection, as the plan wants it."""


class EnoughError(Exception):
    """The rounds that the plan wants are over, and this is one more."""


class MeasuredLink:
    """A link whose bytes are counted, and which can be told to break after so many more."""

    def __init__(self, link: Link, figures: Figures) -> None:
        self._link = link
        self._figures = figures
        self._left_bytes: int | None = None
        self._is_open = True
        self.channel = link.channel
        figures.connected += 1

    def cut_after(self, size_bytes: int) -> None:
        """Break before more than so many bytes have been sent from here on."""
        self._left_bytes = size_bytes

    async def send(self, data: bytes) -> None:
        if self._left_bytes is not None:
            if len(data) > self._left_bytes:
                await self.close()
                raise DroppedOutError("cut while sending")
            self._left_bytes -= len(data)
        await self._link.send(data)
        self._figures.sent_bytes += len(data)

    async def receive(self) -> bytes:
        if not self._is_open:
            raise DroppedOutError("cut while sending")
        data = await self._link.receive()
        self._figures.received_bytes += len(data)
        return data

    async def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._figures.connected -= 1
            await self._link.close()


class SimulatedDevice:
    """Takes part in whatever federation it has joined, and notes how that goes."""

    def __init__(
        self, number: int, plan: Plan, dial: Dial, figures: Figures, updates: MadeUpUpdates
    ) -> None:
        self.name = f"loadtest/{plan.seed}/{number}"
        self._number = number
        self._plan = plan
        self._dial = dial
        self._figures = figures
        self._updates = updates
        self._rng = random.Random(self.name)
        self._link: MeasuredLink | None = None
        self._settings: FederationSettings | None = None
        self._report: FinishedReport | None = None
        self._dropped = ""  # the assignment at which it last did
        self._is_back = False  # after some trouble
        self._dialled_at = self._reported_at = 0.0
        # Of the first check-in and the first answer on the way to the next training: who is sent
        # away, or cut off in its download, goes on waiting.
        self._asked_at: float | None = None
        self._answered_at = 0.0
        self._answer = b""  # the digest of the payload that it named
        self.heard = asyncio.Event()  # a first word from the coordinator, whatever it says

    async def dial(self) -> Link:
        """A session's Dial."""
        self._link = None
        self._dialled_at = _now()
        self._link = MeasuredLink(await self._dial(), self._figures)
        return self._link

    def troubled(self, error: Exception) -> None:
        """Count what a session says has gone wrong."""
        self._is_back = True
        if isinstance(error, DroppedOutError):
            return
        kind = "no_connection" if self._link is None else kind_of(error)
        self._figures.failed(kind, str(error))
        if isinstance(error, ComeBackError):
            self.heard.set()

    # --- session.Worker -----------------------------------------------------------------------

    async def prepare(self, settings: FederationSettings) -> None:
        self._time("connect", self._dialled_at)
        self._figures.joined += self._settings is None
        self._figures.resumed += self._is_back and self._settings is not None
        self._is_back = False
        self._settings = settings
        self.heard.set()

    def offer(self) -> Offer:
        if self._asked_at is None:
            self._asked_at = _now()
        # Where each device has a backbone of its own, any will do.
        return Offer(self._joined().fingerprint or ANY_BACKBONE, self._examples)

    def held(self, digest: bytes) -> NamedTensors | None:
        if digest != self._answer:
            self._answer, self._answered_at = digest, _now()
        return None  # so that every device takes its own download

    def unsent(self) -> FinishedReport | None:
        return self._report

    async def train(self, assignment: Assignment, base: NamedTensors) -> FinishedReport:
        specs = base.specs
        del base  # which is all that there would be to hold of it
        self._figures.assigned(assignment.round, _now())
        if self._plan.rounds and self._figures.rounds >= self._plan.rounds:
            raise EnoughError
        self._figures.under_way.add(self.name)
        self._time_waits()
        update = await self._updates.like(specs, self._joined().update_dtype, self._number)
        await self._wait_and_maybe_drop_out(assignment.assignment, len(update.buffer))
        self._report = FinishedReport(
            assignment.assignment,
            assignment.round,
            assignment.base_version,
            self._examples,
            (Metric("loss", 1.0),),
            update,
        )
        self._reported_at = _now()
        return self._report

    async def settled(self, receipt: Receipt) -> None:
        self._report = None
        self._figures.under_way.discard(self.name)
        self._figures.receipted(receipt.status, _now())
        if receipt.status in (ReceiptStatus.ACCEPTED, ReceiptStatus.DUPLICATE):
            self._time("upload", self._reported_at)
        elif receipt.status is ReceiptStatus.REJECTED:
            self._figures.failed("rejected", receipt.reason)

    async def finish(self, base: NamedTensors, rounds: int) -> None:  # noqa: ARG002
        self._figures.told_the_end(rounds)

    # --- inside -------------------------------------------------------------------------------

    async def _wait_and_maybe_drop_out(self, assignment: str, size_bytes: int) -> None:
        plan, rng = self._plan, self._rng
        # All of them every time: what one device draws does not depend on what comes of it.
        time_s, straggles = plan.training_time.draw_s(rng), rng.random() < plan.stragglers
        drops, moment = rng.random() < plan.dropout, rng.random()
        if straggles:
            self._figures.stragglers += 1
            time_s = plan.straggler_time_s
        if not drops or self._dropped == assignment:
            await asyncio.sleep(time_s)
            return
        self._dropped = assignment
        self._figures.dropouts += 1
        if moment < 0.5:
            await asyncio.sleep(2 * moment * time_s)
            raise DroppedOutError("cut while training")
        await asyncio.sleep(time_s)
        if self._link is not None:
            self._link.cut_after(int((2 * moment - 1) * size_bytes))

    @property
    def _examples(self) -> int:
        return max(EXAMPLES, self._joined().rounds.minimum_examples)

    def _joined(self) -> FederationSettings:
        if self._settings is None:
            raise RuntimeError("the device has not joined")
        return self._settings

    def _time_waits(self) -> None:
        """Those before a training, which begins now."""
        asked_at, self._asked_at, self._answer = self._asked_at, None, b""
        if asked_at is not None:
            self._figures.took("check_in", self._answered_at - asked_at)
        self._time("download", self._answered_at)

    def _time(self, name: str, since: float) -> None:
        self._figures.took(name, _now() - since)


def kind_of(error: Exception) -> str:
    """What an error is counted as: the coordinator's own code where it gave one."""
    match error:
        case ComeBackError(code=code) | RemoteProtocolError(code=code):
            return code.value
        case RefusedError(code=code):
            return code
        case NoAnswerError() | TimeoutError():
            return "no_answer"
        case ProtocolError():
            return "protocol"
        case _:
            return "connection_lost"


def _now() -> float:
    return asyncio.get_running_loop().time()
