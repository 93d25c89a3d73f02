"""The Store on any database that SQLAlchemy Core speaks; SQLite by default.

Its tables are in schema.py. Tensors are checked against their digests when they are read: a damaged
base is never trained from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import sqlalchemy as sa

from coordinator.control import Control, Wish
from coordinator.errors import StoreError
from coordinator.store import rows
from coordinator.store.base import (
    BASES_KEPT,
    BaseRecord,
    Member,
    Outcome,
    ReportRecord,
    RoundOutcome,
    RoundRecord,
    Snapshot,
)
from coordinator.store.database import Database
from coordinator.store.schema import (
    IS_CURRENT,
    IS_OPEN,
    SAME_ROUND,
    SCHEMA_VERSION,
    bases,
    federations,
    members,
    metadata,
    of_round,
    reports,
    rounds,
    schema_version,
)
from protocol import codec
from protocol.federation import FederationSettings, settings_from_json, settings_to_json
from protocol.messages import Assignment, Report
from protocol.tensors import NamedTensors


class SqlStore:
    """A store at a database URL, such as `sqlite:////var/lib/pf2lora/store.sqlite`.

    Args:
        url: any that SQLAlchemy takes.
        create: make a store where there is none; otherwise that is an error.

    Raises:
        StoreError: it cannot be opened, is damaged, or was written by a newer version.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self.database = Database(url, create=create)
        self._label = self.database.label
        try:
            with self._begin() as db:
                self._check_version(db, create)
        except BaseException:
            self.database.close()
            raise

    def create(self, settings: FederationSettings, start: NamedTensors) -> None:
        with self._begin() as db:
            db.execute(
                federations.insert().values(
                    name=settings.name,
                    settings=settings_to_json(settings),
                    rounds_done=0,
                )
            )
            self._keep_base(db, settings.name, 0, start)

    def load(self, federation: str) -> Snapshot | None:
        with self._begin() as db:
            row = db.execute(
                sa.select(federations, bases.c.base_specs, bases.c.base)
                .join(bases, IS_CURRENT)
                .where(federations.c.name == federation)
            ).first()
            if row is None:
                return None
            attempts = db.execute(
                sa.select(rounds.c.number, sa.func.max(rounds.c.attempt).label("attempt"))
                .where(rounds.c.federation == federation, rounds.c.number > row.rounds_done)
                .group_by(rounds.c.number)
            )
            open_round = self._open_round(db, federation)
            reported = self._reported(db, federation, open_round) if open_round else frozenset()
            asked = db.execute(
                sa.select(members.c.device, sa.func.max(members.c.number).label("number"))
                .where(members.c.federation == federation)
                .group_by(members.c.device)
            )
            return Snapshot(
                settings_from_json(row.settings),
                row.rounds_done,
                {one.number: one.attempt for one in attempts},
                rows.tensors(rows.decoded(row.base_specs, Assignment).payload, row.base),
                open_round,
                reported,
                {row.device: row.number for row in asked},
                rows.tensors(rows.decoded(row.memory_specs, Assignment).payload, row.memory)
                if row.memory_specs
                else None,
            )

    def open_round(self, federation: str, record: RoundRecord) -> None:
        with self._begin() as db:
            db.execute(
                rounds.insert().values(
                    federation=federation,
                    number=record.number,
                    attempt=record.attempt,
                    base_version=record.base_version,
                    opened_at=record.opened_at,
                    deadline_at=record.deadline_at,
                )
            )
            db.execute(
                members.insert(),
                [
                    {
                        "assignment": member.assignment,
                        "federation": federation,
                        "number": record.number,
                        "attempt": record.attempt,
                        "device": member.device,
                    }
                    for member in record.cohort
                ],
            )

    def keep_report(self, federation: str, record: ReportRecord) -> bool:
        assignment, payload = record.assignment, record.update.payload()
        message = Report(assignment, bytes(32), record.examples, record.metrics, payload)
        wanted = (members.c.federation == federation, members.c.assignment == assignment)
        is_open = sa.select(rounds.c.number).join(members, SAME_ROUND).where(*wanted, IS_OPEN)
        is_kept = sa.select(reports.c.assignment).where(reports.c.assignment == assignment)
        with self._begin() as db:
            if db.scalar(is_open) is None:
                raise StoreError(f"{self._label}: assignment {assignment} is of no open round")
            if db.scalar(is_kept) is not None:
                return False
            db.execute(
                reports.insert().values(
                    assignment=assignment,
                    received_at=record.received_at,
                    report=codec.encode(message),
                    update_bytes=bytes(record.update.buffer),
                )
            )
        return True

    def reports(self, federation: str, number: int, attempt: int) -> Iterator[ReportRecord]:
        chosen = (
            sa.select(reports.c.assignment)
            .join(members)
            .where(*of_round(members, federation, number, attempt))
            .where(reports.c.update_bytes.is_not(None))
            .order_by(reports.c.assignment)
        )
        with self._begin() as db:
            assignments = list(db.scalars(chosen))
        for assignment in assignments:
            with self._begin() as db:
                row = db.execute(
                    sa.select(reports, members.c.device)
                    .join(members)
                    .where(reports.c.assignment == assignment)
                ).one()
                report = rows.decoded(row.report, Report)
                record = ReportRecord(
                    assignment,
                    row.device,
                    number,
                    attempt,
                    report.examples,
                    report.metrics,
                    row.received_at,
                    rows.tensors(report.payload, row.update_bytes),
                )
            yield record

    def blocks(
        self, federation: str, number: int, attempt: int, begin: int, end: int
    ) -> list[bytes]:
        part = sa.func.substr(reports.c.update_bytes, begin + 1, end - begin)
        chosen = (
            sa.select(part)
            .join(members)
            .where(*of_round(members, federation, number, attempt))
            .where(reports.c.update_bytes.is_not(None))
            .order_by(reports.c.assignment)
        )
        with self._begin() as db:
            return [bytes(block) for block in db.scalars(chosen)]

    def has_report(self, federation: str, assignment: str) -> bool:
        kept = sa.select(reports.c.assignment).join(members)
        wanted = (members.c.federation == federation, members.c.assignment == assignment)
        with self._begin() as db:
            return db.scalar(kept.where(*wanted)) is not None

    def close_round(
        self,
        federation: str,
        number: int,
        attempt: int,
        new_base: NamedTensors | None,
        closed_at: float,
        memory: NamedTensors | None = None,
    ) -> None:
        cohort = sa.select(members.c.assignment).where(
            *of_round(members, federation, number, attempt)
        )
        of_cohort = reports.c.assignment.in_(cohort)
        with self._begin() as db:
            count = db.scalar(sa.select(sa.func.count()).select_from(reports).where(of_cohort))
            db.execute(reports.update().where(of_cohort).values(update_bytes=None))
            closed = db.execute(
                rounds.update()
                .where(*of_round(rounds, federation, number, attempt), IS_OPEN)
                .values(
                    closed_at=closed_at,
                    outcome=(Outcome.AGGREGATED if new_base else Outcome.ABANDONED).value,
                    reports=count,
                    new_version=new_base.digest() if new_base else None,
                )
            )
            if closed.rowcount != 1:
                raise StoreError(f"{self._label}: attempt {attempt} at round {number} is not open")
            if new_base:
                db.execute(
                    federations.update()
                    .where(federations.c.name == federation)
                    .values(
                        rounds_done=number,
                        **(rows.columns("memory", memory) if memory else {}),
                    )
                )
                self._keep_base(db, federation, number, new_base)

    def control(self, federation: str) -> Control:
        with self._begin() as db:
            row = db.execute(
                sa.select(federations.c.wish, federations.c.roll_back_to).where(
                    federations.c.name == federation
                )
            ).first()
            return Control(Wish(row.wish), row.roll_back_to) if row else Control()

    def set_control(self, federation: str, control: Control) -> None:
        with self._begin() as db:
            changed = db.execute(
                federations.update()
                .where(federations.c.name == federation)
                .values(wish=control.wish.value, roll_back_to=control.roll_back_to)
            )
            if changed.rowcount != 1:
                raise StoreError(f"{self._label}: there is no federation {federation!r}")

    def bases(self, federation: str) -> list[BaseRecord]:
        with self._begin() as db:
            rows = db.execute(
                sa.select(bases.c.number, bases.c.version)
                .where(bases.c.federation == federation)
                .order_by(bases.c.number)
            )
            return [BaseRecord(row.number, row.version) for row in rows]

    def roll_back(self, federation: str, number: int) -> Snapshot:
        with self._begin() as db:
            kept = db.execute(
                sa.select(bases.c.number).where(
                    bases.c.federation == federation, bases.c.number == number
                )
            ).first()
            if kept is None:
                raise StoreError(f"{self._label}: no base version of round {number} is kept")
            if self._open_round(db, federation):
                raise StoreError(f"{self._label}: a round is open")
            later = (bases.c.federation == federation, bases.c.number > number)
            db.execute(bases.delete().where(*later))
            db.execute(
                federations.update()
                .where(federations.c.name == federation)
                .values(
                    rounds_done=number,
                    memory_specs=None,
                    memory=None,
                    roll_back_to=None,
                )
            )
        snapshot = self.load(federation)
        if snapshot is None:
            raise StoreError(f"{self._label}: there is no federation {federation!r}")
        return snapshot

    def history(self, federation: str) -> list[RoundOutcome]:
        query = (
            sa.select(rounds)
            .where(rounds.c.federation == federation, ~IS_OPEN)
            .order_by(rounds.c.number, rounds.c.attempt)
        )
        with self._begin() as db:
            return [
                RoundOutcome(
                    row.number,
                    row.attempt,
                    Outcome(row.outcome),
                    row.reports,
                    row.opened_at,
                    row.closed_at,
                    row.base_version,
                    row.new_version,
                )
                for row in db.execute(query)
            ]

    def close(self) -> None:
        self.database.close()

    # --- inside -------------------------------------------------------------------------------

    def _keep_base(
        self, db: sa.Connection, federation: str, number: int, base: NamedTensors
    ) -> None:
        db.execute(
            bases.insert().values(
                federation=federation,
                number=number,
                version=base.digest(),
                **rows.columns("base", base),
            )
        )
        old = (bases.c.federation == federation, bases.c.number <= number - BASES_KEPT)
        db.execute(bases.delete().where(*old))

    def _begin(self) -> contextlib.AbstractContextManager[sa.Connection]:
        return self.database.begin()

    def _check_version(self, db: sa.Connection, create: bool) -> None:
        known = sa.inspect(db).has_table(schema_version.name)
        version = db.scalar(sa.select(schema_version.c.version)) if known else None
        if version is None and not create:
            raise StoreError(f"{self._label} is none of pf2lora's")
        if version is not None and version > SCHEMA_VERSION:
            raise StoreError(
                f"{self._label} has schema version {version}; "
                f"this version of pf2lora knows {SCHEMA_VERSION}"
            )
        # The number goes in last: a store whose making was cut short is made again.
        metadata.create_all(db)
        if version is None:
            db.execute(schema_version.insert().values(version=SCHEMA_VERSION))

    def _open_round(self, db: sa.Connection, federation: str) -> RoundRecord | None:
        row = db.execute(
            sa.select(rounds).where(rounds.c.federation == federation, IS_OPEN)
        ).first()
        if row is None:
            return None
        found = db.execute(
            sa.select(members.c.device, members.c.assignment)
            .where(*of_round(members, federation, row.number, row.attempt))
            .order_by(members.c.device)
        )
        cohort = tuple(Member(device, assignment) for device, assignment in found)
        return RoundRecord(
            row.number, row.attempt, row.base_version, row.opened_at, row.deadline_at, cohort
        )

    def _reported(self, db: sa.Connection, federation: str, record: RoundRecord) -> frozenset[str]:
        query = (
            sa.select(reports.c.assignment)
            .join(members)
            .where(*of_round(members, federation, record.number, record.attempt))
        )
        return frozenset(db.scalars(query))
