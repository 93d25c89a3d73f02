"""Devices and tokens that are forgotten with their process: for simulations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from coordinator.store.devices import (
    BARRED,
    DeviceRecord,
    DeviceStatus,
    TokenRecord,
    TokenUse,
    token_digest,
)


class MemoryDevices:
    """The DeviceStore contract on dictionaries."""

    def __init__(self, asked: Callable[[], set[str]]) -> None:
        """`asked` are the devices that were ever asked in a round."""
        self._asked = asked
        self._devices: dict[str, DeviceRecord] = {}
        self._tokens: dict[str, TokenRecord] = {}

    def find(self, device: str) -> DeviceRecord | None:
        return self._devices.get(device)

    def find_all(self, devices: Sequence[str]) -> dict[str, DeviceRecord]:
        return {device: self._devices[device] for device in devices if device in self._devices}

    def all(self) -> list[DeviceRecord]:
        return [self._devices[device] for device in sorted(self._devices)]

    def add(self, *records: DeviceRecord) -> None:
        self._devices |= {record.device: record for record in records}

    def set_status(self, device: str, status: DeviceStatus, reason: str) -> bool:
        record = self._devices.get(device)
        if record is None:
            return False
        rejected = 0 if status is DeviceStatus.APPROVED else record.rejected
        self.add(replace(record, status=status, reason=reason, rejected=rejected))
        return True

    def add_tokens(self, tokens: Sequence[str], expires_at: float) -> None:
        new = [TokenRecord(token_digest(token), expires_at) for token in tokens]
        self._tokens |= {record.digest: record for record in new}

    def tokens(self) -> list[TokenRecord]:
        return sorted(self._tokens.values(), key=lambda token: (token.expires_at, token.digest))

    def revoke_tokens(self, digests: Sequence[str]) -> None:
        for digest in digests:
            if digest in self._tokens and self._tokens[digest].used_by is None:
                del self._tokens[digest]

    def enrol(self, record: DeviceRecord, token: str, now: float) -> TokenUse:
        found = self._tokens.get(token_digest(token))
        if found is None:
            return TokenUse.UNKNOWN
        if found.used_by is not None:
            return TokenUse.USED
        if found.expires_at <= now:
            return TokenUse.EXPIRED
        self._tokens[found.digest] = replace(found, used_by=record.device)
        self.add(record)
        return TokenUse.ACCEPTED

    def count_pending(self, since: float) -> int:
        for record in self._newcomers(DeviceStatus.PENDING):
            if record.seen_at < since:
                del self._devices[record.device]
        return sum(record.status is DeviceStatus.PENDING for record in self._devices.values())

    def forget_newcomers(self, most: int) -> int:
        old = self._newcomers(DeviceStatus.OPEN)[most:]
        for record in old:
            del self._devices[record.device]
        return len(old)

    def count_rejection(
        self, device: str, reason: str, quarantine_after: int
    ) -> DeviceRecord | None:
        record = self._devices.get(device)
        if record is None:
            return None
        record = replace(record, rejected=record.rejected + 1, reason=reason)
        too_many = 0 < quarantine_after <= record.rejected
        if too_many and record.status is not DeviceStatus.REVOKED:
            record = replace(record, status=DeviceStatus.QUARANTINED)
        self.add(record)
        return record

    def _newcomers(self, status: DeviceStatus) -> list[DeviceRecord]:
        asked = self._asked()
        found = [
            record
            for record in self._devices.values()
            if record.status is status and not record.rejected and record.device not in asked
        ]
        return sorted(found, key=lambda record: record.seen_at, reverse=True)

    def barred(self) -> dict[str, DeviceRecord]:
        return {
            device: record for device, record in self._devices.items() if record.status in BARRED
        }
