"""Who is let in: proofs of keys, tokens, approval, and who is put out again.

key proven?  --no--> refused
revoked or quarantined? --yes--> refused
approved? or a token that is good? or enrolment open? --yes--> let in
otherwise its key is written down as pending, and the device may come back
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

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
        self._added = 0
        self._forgotten = 0

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
        await self._run_blocking(partial(self._check, device, join))
        return Admitted(device, join.key)

    async def keep(self, admitted: Admitted) -> None:
        """Have the key of a device that reports, should it have been forgotten since it joined."""
        if self._forgotten:
            await self._run_blocking(partial(self._let_in_again, admitted))

    async def barred(self) -> dict[str, RefusedError]:
        """The refusals for devices that may not be here (any more), by id."""
        found = await self._run_blocking(self._devices.barred)
        return {device: _refusal(record) for device, record in found.items()}

    def _check(self, device: str, join: Join) -> None:
        record = self._devices.find(device)
        status = record.status if record else None
        if record and status in BARRED:
            raise _refusal(record)
        if status is DeviceStatus.APPROVED:
            return
        if join.token:
            self._enrol(device, join)
        elif self._is_open:
            self._let_in(device, join.key, record)
        else:
            self._ask_for_approval(device, join.key, record)

    def _let_in_again(self, admitted: Admitted) -> None:
        record = self._devices.find(admitted.device)
        self._let_in(admitted.device, admitted.key, record)

    def _let_in(self, device: str, key: bytes, record: DeviceRecord | None) -> None:
        if record and record.status is not DeviceStatus.PENDING:
            return
        if self._added % self._added_at_once == 0:
            self._forgotten += self._devices.forget_newcomers(self._newcomers_kept)
        self._added += 1
        self._add(device, key, DeviceStatus.OPEN)

    def _enrol(self, device: str, join: Join) -> None:
        now = self._clock()
        record = DeviceRecord(device, join.key, DeviceStatus.APPROVED, now, reason="token")
        use = self._devices.enrol(record, join.token, now)
        if use is not TokenUse.ACCEPTED:
            raise RefusedError(ErrorCode.TOKEN, f"the enrolment token {use.value}")
        log.info("device %s enrolled by token", device)

    def _ask_for_approval(self, device: str, key: bytes, record: DeviceRecord | None) -> None:
        if record is None or record.status is not DeviceStatus.PENDING:
            waiting = self._devices.count_pending(self._clock() - PENDING_KEPT_S)
            if waiting >= PENDING_MAX:
                raise RefusedError(
                    ErrorCode.PENDING, f"{waiting} devices wait for approval already; use a token"
                )
            self._add(device, key, DeviceStatus.PENDING)
            log.warning("device %s waits for approval", device)
        raise RefusedError(ErrorCode.PENDING, f"device {device} waits for the operator's approval")

    def _add(self, device: str, key: bytes, status: DeviceStatus) -> None:
        self._devices.add(DeviceRecord(device, key, status, self._clock()))


def _refusal(record: DeviceRecord) -> RefusedError:
    code = {
        DeviceStatus.REVOKED: ErrorCode.REVOKED,
        DeviceStatus.QUARANTINED: ErrorCode.QUARANTINED,
    }[record.status]
    why = f": {record.reason}" if record.reason else ""
    return RefusedError(code, f"device {record.device} is {record.status.value}{why}")
