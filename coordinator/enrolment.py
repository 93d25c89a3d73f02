"""Who is let in: proofs of keys, tokens, approval, and who is put out again.

key proven?  --no--> refused
revoked or quarantined? --yes--> refused
approved? or a token that is good? or enrolment open? --yes--> let in
otherwise its key is written down as pending, and the device may come back
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NoReturn

from coordinator.blocking import RunBlocking
from coordinator.errors import RefusedError
from coordinator.security import is_signed
from coordinator.store.devices import (
    BARRED,
    DeviceRecord,
    DeviceStatus,
    DeviceStore,
    TokenUse,
)
from protocol.errors import ErrorCode
from protocol.messages import Join, Report
from protocol.signing import device_id, join_statement, report_statement

log = logging.getLogger("pf2lora.coordinator")

# Anyone who reaches the port can leave a key: so many at most, and none for longer than this.
PENDING_MAX: Final = 1000
PENDING_KEPT_S: Final = 24 * 3600.0
# Where enrolment is open, so many keys of devices that were never asked in a round.
NEWCOMERS_MAX: Final = 10_000
# Devices that are looked at together: enough to share a flush to the disk, few enough to be soon
# done, and that the store's other calls need not wait long.
LOOKED_AT_TOGETHER_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Admitted:
    """A device that has proven its key and may take part."""

    device: str
    key: bytes

    def check_report(self, report: Report, federation: str) -> None:
        """Refuse a report that this device has not signed as it stands.

        Raises:
            RefusedError: the signature is another report's, device's or federation's, or none.
        """
        statement = report_statement(report, federation, self.device)
        if not is_signed(self.key, report.signature, statement):
            raise RefusedError(ErrorCode.SIGNATURE, "the report's signature is not this device's")


@dataclass(frozen=True, slots=True)
class _Asked:
    """A device that has proven its key and waits to be let in."""

    device: str
    join: Join
    answer: asyncio.Future[None]

    def settle(self, refusal: Exception | None) -> None:
        if self.answer.done():  # its connection is gone
            return
        if refusal is None:
            self.answer.set_result(None)
        else:
            self.answer.set_exception(refusal)


class Gate:
    """Lets devices in and says who must leave.

    Args:
        devices: the store's.
        is_open: whether keys that nobody has enrolled may take part.
        run_blocking: for calls of the store.
        clock: Unix seconds.
        newcomers_max: how many open keys are kept of devices that were never asked in a round.
    """

    def __init__(
        self,
        devices: DeviceStore,
        *,
        is_open: bool,
        run_blocking: RunBlocking,
        clock: Callable[[], float] = time.time,
        newcomers_max: int = NEWCOMERS_MAX,
    ) -> None:
        self._devices = devices
        self._is_open = is_open
        self._run_blocking = run_blocking
        self._clock = clock
        # Looking for those that may be forgotten is dear: once for every tenth of them that comes.
        self._added_at_once = max(1, newcomers_max // 10)
        self._newcomers_kept = newcomers_max - self._added_at_once
        self._room_for = 0  # so many more, until it is time to look
        self._forgotten = 0
        self._together_max = min(LOOKED_AT_TOGETHER_MAX, self._added_at_once)
        self._asked: deque[_Asked] = deque()
        self._looking: asyncio.Task[None] | None = None

    async def admit(self, join: Join, nonce: bytes, version: int, channel: bytes) -> Admitted:
        """The device that has answered the challenge `nonce`.

        `channel` names this coordinator's certificate; empty where it does not end TLS itself: a
        proxy may, with a certificate that is not known here.

        Raises:
            RefusedError: it has not, or may not take part.
        """
        if not is_signed(join.key, join.signature, join_statement(join, nonce, version)):
            raise RefusedError(
                ErrorCode.SIGNATURE, "the challenge is not signed by the key that was shown"
            )
        if channel and join.channel != channel:
            raise RefusedError(
                ErrorCode.SIGNATURE,
                "the device was shown another certificate: someone is in between",
            )
        device = device_id(join.key)
        asked = _Asked(device, join, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        await asked.answer
        return Admitted(device, join.key)

    async def keep(self, admitted: Admitted) -> None:
        """Have the key of a device that reports, should it have been forgotten since it joined."""
        if self._forgotten:
            await self._run_blocking(partial(self._let_in_again, admitted))

    async def barred(self) -> dict[str, RefusedError]:
        """The refusals for devices that may not be here (any more), by id."""
        found = await self._run_blocking(self._devices.barred)
        return {device: _refusal(record) for device, record in found.items()}

    async def _look(self) -> None:
        """Answer all who ask. Those that come while the store is busy share its next calls."""
        try:
            while self._asked:
                count = min(len(self._asked), self._together_max)
                some = [self._asked.popleft() for _ in range(count)]
                refusals: Sequence[Exception | None]
                try:
                    refusals = await self._run_blocking(partial(self._check, some))
                except Exception as error:  # the store's, met by each of them
                    refusals = [error] * count
                for asked, refusal in zip(some, refusals, strict=True):
                    asked.settle(refusal)
        finally:
            self._looking = None

    def _check(self, some: Sequence[_Asked]) -> list[RefusedError | None]:
        """Why each is not let in; None for those that are, whose keys are kept."""
        known = self._devices.find_all([asked.device for asked in some])
        new: dict[str, DeviceRecord] = {}
        refusals: list[RefusedError | None] = []
        for asked in some:
            refusal = None
            try:
                newcomer = self._check_one(asked.device, asked.join, known.get(asked.device))
                if newcomer:
                    new[asked.device] = newcomer
            except RefusedError as error:
                refusal = error
            refusals.append(refusal)
        self._let_in(list(new.values()))
        return refusals

    def _check_one(
        self, device: str, join: Join, record: DeviceRecord | None
    ) -> DeviceRecord | None:
        """What is yet to be kept of a device that is let in, if anything."""
        if record and record.status in BARRED:
            raise _refusal(record)
        if record and record.status is DeviceStatus.APPROVED:
            return None
        if join.token:
            self._enrol(device, join)
            return None
        if not self._is_open:
            self._ask_for_approval(device, join.key, record)
        return self._newcomer(device, join.key, record)

    def _newcomer(
        self, device: str, key: bytes, record: DeviceRecord | None
    ) -> DeviceRecord | None:
        if record and record.status is not DeviceStatus.PENDING:
            return None
        return DeviceRecord(device, key, DeviceStatus.OPEN, self._clock())

    def _let_in_again(self, admitted: Admitted) -> None:
        record = self._devices.find(admitted.device)
        newcomer = self._newcomer(admitted.device, admitted.key, record)
        self._let_in([newcomer] if newcomer else [])

    def _let_in(self, newcomers: Sequence[DeviceRecord]) -> None:
        if not newcomers:
            return
        if self._room_for < len(newcomers):
            self._forgotten += self._devices.forget_newcomers(self._newcomers_kept)
            self._room_for = self._added_at_once
        self._room_for -= len(newcomers)
        self._devices.add(*newcomers)

    def _enrol(self, device: str, join: Join) -> None:
        now = self._clock()
        record = DeviceRecord(device, join.key, DeviceStatus.APPROVED, now, reason="token")
        use = self._devices.enrol(record, join.token, now)
        if use is not TokenUse.ACCEPTED:
            raise RefusedError(ErrorCode.TOKEN, f"the enrolment token {use.value}")
        log.info("device %s enrolled by token", device)

    def _ask_for_approval(self, device: str, key: bytes, record: DeviceRecord | None) -> NoReturn:
        if record is None or record.status is not DeviceStatus.PENDING:
            waiting = self._devices.count_pending(self._clock() - PENDING_KEPT_S)
            if waiting >= PENDING_MAX:
                raise RefusedError(
                    ErrorCode.PENDING, f"{waiting} devices wait for approval already; use a token"
                )
            self._devices.add(DeviceRecord(device, key, DeviceStatus.PENDING, self._clock()))
            log.warning("device %s waits for approval", device)
        raise RefusedError(ErrorCode.PENDING, f"device {device} waits for the operator's approval")


def _refusal(record: DeviceRecord) -> RefusedError:
    code = {
        DeviceStatus.REVOKED: ErrorCode.REVOKED,
        DeviceStatus.QUARANTINED: ErrorCode.QUARANTINED,
    }[record.status]
    why = f": {record.reason}" if record.reason else ""
    return RefusedError(code, f"device {record.device} is {record.status.value}{why}")
