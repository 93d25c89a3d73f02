"""Devices and tokens in the SQL store's database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Final

import sqlalchemy as sa

from coordinator.store.devices import (
    BARRED,
    DeviceRecord,
    DeviceStatus,
    TokenRecord,
    TokenUse,
    token_digest,
)
from coordinator.store.schema import devices, members, tokens

_IS_PENDING: Final = devices.c.status == DeviceStatus.PENDING.value
_IS_OPEN: Final = devices.c.status == DeviceStatus.OPEN.value
_IS_NEW: Final = sa.and_(
    devices.c.rejected == 0, devices.c.device.not_in(sa.select(members.c.device))
)


class SqlDevices:
    """The DeviceStore contract; `begin` opens a transaction."""

    def __init__(self, begin: Callable[[], AbstractContextManager[sa.Connection]]) -> None:
        self._begin = begin

    def find(self, device: str) -> DeviceRecord | None:
        with self._begin() as db:
            return _found(db, device)

    def find_all(self, devices_: Sequence[str]) -> dict[str, DeviceRecord]:
        with self._begin() as db:
            rows = db.execute(sa.select(devices).where(devices.c.device.in_(devices_)))
            return {row.device: _record(row) for row in rows}

    def all(self) -> list[DeviceRecord]:
        with self._begin() as db:
            return [_record(row) for row in db.execute(sa.select(devices).order_by("device"))]

    def add(self, *records: DeviceRecord) -> None:
        with self._begin() as db:
            _put(db, records)

    def set_status(self, device: str, status: DeviceStatus, reason: str) -> bool:
        forgotten = {"rejected": 0} if status is DeviceStatus.APPROVED else {}
        with self._begin() as db:
            changed = db.execute(
                devices.update()
                .where(devices.c.device == device)
                .values(status=status.value, reason=reason, **forgotten)
            )
        return changed.rowcount == 1

    def add_tokens(self, new: Sequence[str], expires_at: float) -> None:
        added = [{"digest": token_digest(token), "expires_at": expires_at} for token in new]
        with self._begin() as db:
            db.execute(tokens.insert(), added)

    def tokens(self) -> list[TokenRecord]:
        with self._begin() as db:
            rows = db.execute(sa.select(tokens).order_by("expires_at", "digest"))
            return [TokenRecord(row.digest, row.expires_at, row.used_by) for row in rows]

    def revoke_tokens(self, digests: Sequence[str]) -> None:
        is_this = tokens.c.digest == sa.bindparam("revoked")
        unused = tokens.delete().where(is_this, tokens.c.used_by.is_(None))
        with self._begin() as db:
            db.execute(unused, [{"revoked": digest} for digest in digests])

    def enrol(self, record: DeviceRecord, token: str, now: float) -> TokenUse:
        is_this = tokens.c.digest == token_digest(token)
        with self._begin() as db:
            # Taken before it is looked at: of two that come at once, one finds it used.
            taken = db.execute(
                tokens.update()
                .where(is_this, tokens.c.used_by.is_(None), tokens.c.expires_at > now)
                .values(used_by=record.device)
            )
            if taken.rowcount == 1:
                _put(db, [record])
                return TokenUse.ACCEPTED
            row = db.execute(sa.select(tokens).where(is_this)).first()
        if row is None:
            return TokenUse.UNKNOWN
        return TokenUse.EXPIRED if row.used_by is None else TokenUse.USED

    def count_pending(self, since: float) -> int:
        with self._begin() as db:
            db.execute(devices.delete().where(_IS_PENDING, devices.c.seen_at < since, _IS_NEW))
            count = db.scalar(sa.select(sa.func.count()).select_from(devices).where(_IS_PENDING))
        return int(count or 0)

    def forget_newcomers(self, most: int) -> int:
        times = sa.select(devices.c.seen_at).where(_IS_OPEN, _IS_NEW)
        with self._begin() as db:
            last = db.scalar(times.order_by(devices.c.seen_at.desc()).offset(most).limit(1))
            if last is None:
                return 0
            old = (_IS_OPEN, devices.c.seen_at <= last, _IS_NEW)
            return db.execute(devices.delete().where(*old)).rowcount

    def count_rejection(
        self, device: str, reason: str, quarantine_after: int
    ) -> DeviceRecord | None:
        rejected = devices.c.rejected + 1
        with self._begin() as db:
            values: dict[str, Any] = {"rejected": rejected, "reason": reason}
            if quarantine_after:
                too_many = sa.and_(
                    rejected >= quarantine_after,
                    devices.c.status != DeviceStatus.REVOKED.value,
                )
                quarantined = DeviceStatus.QUARANTINED.value
                values["status"] = sa.case((too_many, quarantined), else_=devices.c.status)
            db.execute(devices.update().where(devices.c.device == device).values(**values))
            return _found(db, device)

    def barred(self) -> dict[str, DeviceRecord]:
        out = [status.value for status in BARRED]
        with self._begin() as db:
            rows = db.execute(sa.select(devices).where(devices.c.status.in_(out)))
            return {row.device: _record(row) for row in rows}


def _found(db: sa.Connection, device: str) -> DeviceRecord | None:
    row = db.execute(sa.select(devices).where(devices.c.device == device)).first()
    return _record(row) if row else None


def _put(db: sa.Connection, records: Sequence[DeviceRecord]) -> None:
    ids = [record.device for record in records]
    db.execute(devices.delete().where(devices.c.device.in_(ids)))
    db.execute(devices.insert(), [{**asdict(one), "status": one.status.value} for one in records])


def _record(row: sa.Row[Any]) -> DeviceRecord:
    return DeviceRecord(
        row.device, row.key, DeviceStatus(row.status), row.seen_at, row.rejected, row.reason
    )
