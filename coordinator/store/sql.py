"""The Store on any database that SQLAlchemy Core speaks; SQLite by default.

SQLite runs in WAL mode with synchronous=FULL: a transaction that has returned is on the disk. What
has a fixed form on the wire (settings, metrics, tensor specs) is stored in it, as protocol bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from coordinator.errors import StorageFullError, StoreError
from coordinator.store.base import (
    Member,
    Outcome,
    ReportRecord,
    RoundOutcome,
    RoundRecord,
    Snapshot,
)
from protocol import codec
from protocol.errors import ProtocolError
from protocol.federation import FederationSettings
from protocol.messages import Assignment, Joined, Report
from protocol.tensors import NamedTensors

SCHEMA_VERSION: Final = 1

_schema = sa.MetaData()
_version = sa.Table("schema_version", _schema, sa.Column("version", sa.Integer, nullable=False))
_federations = sa.Table(
    "federations",
    _schema,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("settings", sa.LargeBinary, nullable=False),
    sa.Column("rounds_done", sa.Integer, nullable=False),
    sa.Column("base_specs", sa.LargeBinary, nullable=False),
    sa.Column("base", sa.LargeBinary, nullable=False),
)
_rounds = sa.Table(
    "rounds",
    _schema,
    sa.Column("federation", sa.ForeignKey("federations.name"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("base_version", sa.LargeBinary, nullable=False),
    sa.Column("opened_at", sa.Float, nullable=False),
    sa.Column("deadline_at", sa.Float, nullable=False),
    sa.Column("closed_at", sa.Float),
    sa.Column("outcome", sa.String(16)),
    sa.Column("reports", sa.Integer),
    sa.Column("new_version", sa.LargeBinary),
)
_members = sa.Table(
    "members",
    _schema,
    sa.Column("assignment", sa.String(64), primary_key=True),
    sa.Column("federation", sa.String(128), nullable=False, index=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("device", sa.String(64), nullable=False),
)
_reports = sa.Table(
    "reports",
    _schema,
    sa.Column("assignment", sa.ForeignKey("members.assignment"), primary_key=True),
    sa.Column("received_at", sa.Float, nullable=False),
    sa.Column("report", sa.LargeBinary, nullable=False),
    sa.Column("update_bytes", sa.LargeBinary),  # dropped when the round is closed
)


class SqlStore:
    """A store at a database URL, such as `sqlite:////var/lib/pf2lora/store.sqlite`.

    Raises:
        StoreError: it cannot be opened, is damaged, or was written by a newer version.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        with self._translated():
            address = sa.make_url(url)
            if address.get_backend_name() == "sqlite" and address.database:
                _make_private(Path(address.database))
            self._engine = sa.create_engine(address, poolclass=sa.pool.StaticPool)
            if address.get_backend_name() == "sqlite":
                sa.event.listen(self._engine, "connect", _set_up_sqlite)
        try:
            with self._begin() as db:
                self._check_version(db)
        except StoreError:
            self._engine.dispose()
            raise

    def create(self, settings: FederationSettings, start: NamedTensors) -> None:
        with self._begin() as db:
            db.execute(
                _federations.insert().values(
                    name=settings.name,
                    settings=codec.encode(Joined(settings)),
                    rounds_done=0,
                    **_base_columns(start),
                )
            )

    def load(self, federation: str) -> Snapshot | None:
        with self._begin() as db:
            row = db.execute(
                sa.select(_federations).where(_federations.c.name == federation)
            ).first()
            if row is None:
                return None
            number = row.rounds_done + 1
            attempt = db.scalar(
                sa.select(sa.func.max(_rounds.c.attempt)).where(
                    _rounds.c.federation == federation, _rounds.c.number == number
                )
            )
            open_round = self._open_round(db, federation)
            reported = self._reported(db, federation, open_round) if open_round else frozenset()
            return Snapshot(
                _settings(row.settings),
                row.rounds_done,
                attempt or 0,
                NamedTensors(_specs(row.base_specs), row.base),
                open_round,
                reported,
            )

    def open_round(self, federation: str, record: RoundRecord) -> None:
        with self._begin() as db:
            db.execute(
                _rounds.insert().values(
                    federation=federation,
                    number=record.number,
                    attempt=record.attempt,
                    base_version=record.base_version,
                    opened_at=record.opened_at,
                    deadline_at=record.deadline_at,
                )
            )
            db.execute(
                _members.insert(),
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

    def keep_report(self, federation: str, record: ReportRecord) -> bool:  # noqa: ARG002
        message = Report(
            record.assignment, bytes(32), record.examples, record.metrics, record.update.payload()
        )
        try:
            with self._begin() as db:
                db.execute(
                    _reports.insert().values(
                        assignment=record.assignment,
                        received_at=record.received_at,
                        report=codec.encode(message),
                        update_bytes=bytes(record.update.buffer),
                    )
                )
        except _AlreadyThereError:
            return False
        return True

    def reports(self, federation: str, number: int, attempt: int) -> Iterator[ReportRecord]:
        chosen = (
            sa.select(_reports.c.assignment)
            .join(_members)
            .where(*_of_round(_members, federation, number, attempt))
            .order_by(_reports.c.assignment)
        )
        with self._begin() as db:
            assignments = list(db.scalars(chosen))
        for assignment in assignments:
            with self._begin() as db:
                row = db.execute(
                    sa.select(_reports, _members.c.device)
                    .join(_members)
                    .where(_reports.c.assignment == assignment)
                ).one()
            report = _decoded(row.report, Report)
            yield ReportRecord(
                assignment,
                row.device,
                number,
                attempt,
                report.examples,
                report.metrics,
                row.received_at,
                NamedTensors(report.payload.tensors, row.update_bytes),
            )

    def close_round(
        self,
        federation: str,
        number: int,
        attempt: int,
        new_base: NamedTensors | None,
        closed_at: float,
    ) -> None:
        members = sa.select(_members.c.assignment).where(
            *_of_round(_members, federation, number, attempt)
        )
        of_round = _reports.c.assignment.in_(members)
        with self._begin() as db:
            count = db.scalar(sa.select(sa.func.count()).select_from(_reports).where(of_round))
            db.execute(_reports.update().where(of_round).values(update_bytes=None))
            db.execute(
                _rounds.update()
                .where(*_of_round(_rounds, federation, number, attempt))
                .values(
                    closed_at=closed_at,
                    outcome=(Outcome.AGGREGATED if new_base else Outcome.ABANDONED).value,
                    reports=count,
                    new_version=new_base.digest() if new_base else None,
                )
            )
            if new_base:
                db.execute(
                    _federations.update()
                    .where(_federations.c.name == federation)
                    .values(rounds_done=number, **_base_columns(new_base))
                )

    def history(self, federation: str) -> list[RoundOutcome]:
        query = (
            sa.select(_rounds)
            .where(_rounds.c.federation == federation, _rounds.c.outcome.is_not(None))
            .order_by(_rounds.c.number, _rounds.c.attempt)
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
        with self._translated():
            self._engine.dispose()

    # --- inside -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        with self._translated(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.IntegrityError as error:
            raise _AlreadyThereError(str(error.orig)) from error
        except sa.exc.SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).splitlines()[0]
            kind = StorageFullError if "disk is full" in cause else StoreError
            raise kind(f"the store {self._url}: {cause}") from error
        except (OSError, ProtocolError, ModuleNotFoundError) as error:
            raise StoreError(f"the store {self._url}: {error}") from error

    def _check_version(self, db: sa.Connection) -> None:
        _schema.create_all(db)
        version = db.scalar(sa.select(_version.c.version))
        if version is None:
            db.execute(_version.insert().values(version=SCHEMA_VERSION))
        elif version > SCHEMA_VERSION:
            raise StoreError(
                f"the store {self._url} has schema version {version}; "
                f"this version of pf2lora knows {SCHEMA_VERSION}"
            )

    def _open_round(self, db: sa.Connection, federation: str) -> RoundRecord | None:
        row = db.execute(
            sa.select(_rounds).where(
                _rounds.c.federation == federation, _rounds.c.outcome.is_(None)
            )
        ).first()
        if row is None:
            return None
        members = db.execute(
            sa.select(_members.c.device, _members.c.assignment)
            .where(*_of_round(_members, federation, row.number, row.attempt))
            .order_by(_members.c.device)
        )
        cohort = tuple(Member(device, assignment) for device, assignment in members)
        return RoundRecord(
            row.number, row.attempt, row.base_version, row.opened_at, row.deadline_at, cohort
        )

    def _reported(self, db: sa.Connection, federation: str, record: RoundRecord) -> frozenset[str]:
        query = (
            sa.select(_reports.c.assignment)
            .join(_members)
            .where(*_of_round(_members, federation, record.number, record.attempt))
        )
        return frozenset(db.scalars(query))


class _AlreadyThereError(StoreError):
    """A row of this key is there already."""


def _of_round(
    table: sa.Table, federation: str, number: int, attempt: int
) -> tuple[sa.ColumnElement[bool], ...]:
    columns = table.c
    return (
        columns.federation == federation,
        columns.number == number,
        columns.attempt == attempt,
    )


def _base_columns(base: NamedTensors) -> dict[str, Any]:
    payload = base.payload()
    message = Assignment("specs", 1, payload.digest, 0.0, payload)
    return {"base_specs": codec.encode(message), "base": bytes(base.buffer)}


def _specs(data: bytes) -> Any:
    return _decoded(data, Assignment).payload.tensors


def _settings(data: bytes) -> FederationSettings:
    settings: FederationSettings = _decoded(data, Joined).settings
    return settings


def _decoded(data: bytes, cls: type[Any]) -> Any:
    message = codec.decode(data)
    if not isinstance(message, cls):
        raise StoreError(f"the store holds a {type(message).__name__} for a {cls.__name__}")
    return message


def _make_private(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _set_up_sqlite(connection: Any, _: object) -> None:
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=10000",
    ):
        connection.execute(f"PRAGMA {pragma}")
