"""The Store on any database that SQLAlchemy Core speaks; SQLite by default.

Its tables are in schema.py. Tensors are checked against their digests when they are read: a damaged
base is never trained from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from coordinator.control import Control, Wish
from coordinator.errors import StoreError
from coordinator.store import rows
from coordinator.store.base import (
    Awaited,
    Member,
    Outcome,
    ReportRecord,
    RoundOutcome,
    RoundRecord,
    Snapshot,
)
from coordinator.store.bases import BasesTable
from coordinator.store.database import Database
from coordinator.store.migrate import migrate, require_current
from coordinator.store.parts import PartsTable
from coordinator.store.schema import (
    IS_CURRENT,
    IS_OPEN,
    SAME_ROUND,
    bases,
    federations,
    is_awaited,
    kept_in,
    members,
    of_round,
    parts,
    reports,
    rounds,
)
from coordinator.store.sql_devices import SqlDevices
from protocol.federation import FederationSettings, settings_from_json, settings_to_json
from protocol.messages import Assignment, Report
from protocol.tensors import NamedTensors


class SqlStore(BasesTable, PartsTable):
    """A store at a database URL, such as `sqlite:////var/lib/pf2lora/store.sqlite`.

    Args:
        url: any that SQLAlchemy takes.
        create: make a store where there is none, and bring an older one up to date; otherwise both
            are errors.

    Raises:
        StoreError: it cannot be opened, is damaged, or was written by a newer version; with `sole`,
            also if another process has it for itself, or a page is damaged that is not yet needed.
    """

    def __init__(self, url: str, *, create: bool = True, sole: bool = False) -> None:
        self.database = Database(url, create=create, sole=sole)
        self._label = self.database.label
        try:
            if sole:  # damage grows where it is written on
                self.database.check_pages(indexes=False)
            (migrate if create else require_current)(self.database)
        except BaseException:
            self.database.close()
            raise

    @property
    def devices(self) -> SqlDevices:
        return SqlDevices(self._begin)

    def create(self, settings: FederationSettings, start: NamedTensors) -> None:
        with self._begin() as db:
            db.execute(
                federations.insert().values(
                    name=settings.name,
                    settings=settings_to_json(settings),
                    rounds_done=0,
                )
            )
            self.keep_base(db, settings.name, 0, start)

    def change_settings(self, settings: FederationSettings) -> None:
        self._set(settings.name, settings=settings_to_json(settings))

    def load(self, federation: str) -> Snapshot | None:
        with self._begin() as db:
            row = db.execute(
                sa.select(federations, *bases.c["number", "version", "base_specs", "base"])
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
            awaited = self._awaited(db, federation)
            return Snapshot(
                settings_from_json(row.settings),
                row.rounds_done,
                {one.number: one.attempt for one in attempts},
                rows.base(row),
                open_round,
                reported,
                {row.device: row.number for row in asked},
                rows.tensors(rows.decoded(row.memory_specs, Assignment).payload, row.memory)
                if row.memory_specs
                else None,
                awaited,
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
            if record.cohort:
                cohort = [
                    _member_row(federation, record.number, record.attempt, member)
                    for member in record.cohort
                ]
                db.execute(members.insert(), cohort)

    def add_assignment(
        self,
        federation: str,
        number: int,
        attempt: int,
        member: Member,
        deadline_at: float | None = None,
    ) -> None:
        earlier = (is_awaited(federation), members.c.device == member.device)
        with self._begin() as db:
            self._require_open(db, federation, number, attempt)
            if deadline_at is not None:
                db.execute(members.update().where(*earlier).values(deadline_at=None))
            added = _member_row(federation, number, attempt, member)
            db.execute(members.insert().values(**added, deadline_at=deadline_at))

    def keep_reports(self, federation: str, records: Sequence[ReportRecord]) -> list[bool]:
        assignments = [record.assignment for record in records]
        given = (members.c.federation == federation, members.c.assignment.in_(assignments))
        known = (
            sa.select(members.c.assignment, reports.c.assignment.is_not(None).label("is_kept"))
            .outerjoin(reports)
            .where(*given)
        )
        awaited = (*given, members.c.deadline_at.is_not(None))
        with self._begin() as db:
            for number, attempt in {(record.round, record.attempt) for record in records}:
                self._require_open(db, federation, number, attempt)
            kept = {row.assignment: bool(row.is_kept) for row in db.execute(known)}
            for assignment in assignments:
                if assignment not in kept:
                    raise StoreError(f"{self._label}: there is no assignment {assignment}")
            new = {r.assignment: r for r in records if not kept[r.assignment]}
            for record in new.values():  # one by one: each is large
                db.execute(reports.insert().values(rows.report_columns(federation, record)))
            db.execute(members.update().where(*awaited).values(deadline_at=None))
            db.execute(parts.delete().where(parts.c.assignment.in_(assignments)))
        return [new.get(record.assignment) is record for record in records]

    def reports(self, federation: str, number: int, attempt: int) -> Iterator[ReportRecord]:
        chosen = kept_in(reports.c.assignment, federation, number, attempt)
        with self._begin() as db:
            assignments = list(db.scalars(chosen))
        for assignment in assignments:
            with self._begin() as db:
                row = db.execute(
                    sa.select(reports, members.c.device, members.c.number.label("given_in"))
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
                    report.base_version,
                    report.signature,
                    number - row.given_in,
                )
            yield record

    def blocks(
        self, federation: str, number: int, attempt: int, begin: int, end: int
    ) -> Iterator[bytes]:
        with self._begin() as db:
            chosen = kept_in(reports.c.update_bytes, federation, number, attempt)
            yield from self.database.slices(db, chosen, begin, end)

    def staleness(self, federation: str, number: int, attempt: int) -> list[int]:
        with self._begin() as db:
            given = db.scalars(kept_in(members.c.number, federation, number, attempt))
            return [number - given_in for given_in in given]

    def has_report(self, federation: str, assignment: str) -> bool:
        wanted = (reports.c.federation == federation, reports.c.assignment == assignment)
        with self._begin() as db:
            return db.scalar(sa.select(reports.c.assignment).where(*wanted)) is not None

    def close_round(
        self,
        federation: str,
        number: int,
        attempt: int,
        new_base: NamedTensors | None,
        closed_at: float,
        memory: NamedTensors | None = None,
    ) -> None:
        counted = of_round(reports, federation, number, attempt)
        with self._begin() as db:
            count = db.scalar(sa.select(sa.func.count()).select_from(reports).where(*counted))
            # Written anew without their updates: a row that is cut short keeps its place in the
            # file, and up to a page of room that nothing can use.
            said = [column for column in reports.c if column is not reports.c.update_bytes]
            anew = reports.insert().prefix_with("OR REPLACE")
            db.execute(anew.from_select(said, sa.select(*said).where(*counted)))
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
            expired = (is_awaited(federation), members.c.deadline_at <= closed_at)
            db.execute(members.update().where(*expired).values(deadline_at=None))
            self.drop_unawaited(db, federation)
            if new_base:
                db.execute(
                    federations.update()
                    .where(federations.c.name == federation)
                    .values(
                        rounds_done=number,
                        **(rows.columns("memory", memory) if memory else {}),
                    )
                )
                self.keep_base(db, federation, number, new_base)

    def control(self, federation: str) -> Control:
        with self._begin() as db:
            row = db.execute(
                sa.select(federations.c.wish, federations.c.roll_back_to).where(
                    federations.c.name == federation
                )
            ).first()
            return Control(Wish(row.wish), row.roll_back_to) if row else Control()

    def set_wish(self, federation: str, wish: Wish) -> None:
        self._set(federation, wish=wish.value)

    def set_roll_back(self, federation: str, number: int | None) -> None:
        self._set(federation, roll_back_to=number)

    def roll_back(self, federation: str, number: int) -> Snapshot:
        with self._begin() as db:
            # Read whole: there is no way back from a damaged one.
            if self.base_in(db, federation, number) is None:
                raise StoreError(f"{self._label}: no base version of round {number} is kept")
            if self._open_round(db, federation):
                raise StoreError(f"{self._label}: a round is open")
            db.execute(members.update().where(is_awaited(federation)).values(deadline_at=None))
            self.drop_unawaited(db, federation)
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

    def _begin(self) -> contextlib.AbstractContextManager[sa.Connection]:
        return self.database.begin()

    def _set(self, federation: str, **column: Any) -> None:
        changed_row = federations.update().where(federations.c.name == federation)
        with self._begin() as db:
            if db.execute(changed_row.values(**column)).rowcount != 1:
                raise StoreError(f"{self._label}: there is no federation {federation!r}")

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
        counted = of_round(reports, federation, record.number, record.attempt)
        return frozenset(db.scalars(sa.select(reports.c.assignment).where(*counted)))

    def _awaited(self, db: sa.Connection, federation: str) -> tuple[Awaited, ...]:
        query = (
            sa.select(members, rounds.c.base_version)
            .join(rounds, SAME_ROUND)
            .where(is_awaited(federation))
            .order_by(members.c.device)
        )
        return tuple(
            Awaited(row.device, row.assignment, row.number, row.deadline_at, row.base_version)
            for row in db.execute(query)
        )

    def _require_open(self, db: sa.Connection, federation: str, number: int, attempt: int) -> None:
        wanted = of_round(rounds, federation, number, attempt)
        if db.scalar(sa.select(rounds.c.number).where(*wanted, IS_OPEN)) is None:
            raise StoreError(f"{self._label}: attempt {attempt} at round {number} is not open")


def _member_row(federation: str, number: int, attempt: int, member: Member) -> dict[str, Any]:
    return {
        "assignment": member.assignment,
        "federation": federation,
        "number": number,
        "attempt": attempt,
        "device": member.device,
    }
