"""The Store on any database that SQLAlchemy Core speaks; SQLite by default.

SQLite runs in WAL mode with synchronous=FULL: a transaction that has returned is on the disk. What
has a fixed form on the wire (metrics, tensor specs) is stored in it, as protocol bytes; settings by
name, so that a version with more of them can read them.
Tensors are checked against their digests when they are read: a damaged base is never trained from.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from coordinator.control import Control, Wish
from coordinator.errors import StorageFullError, StoreError
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
from protocol import codec, limits
from protocol.errors import ErrorCode, ProtocolError, RemoteProtocolError
from protocol.federation import FederationSettings, settings_from_json, settings_to_json
from protocol.messages import Assignment, Report
from protocol.schema import SchemaError
from protocol.tensors import NamedTensors, Payload

SCHEMA_VERSION: Final = 1
DISK_FULL: Final = ("disk is full", "No space left on device")  # SQLite's words; the system's
# A length makes MySQL choose a type that holds this much; the others do not care.
_Bytes: Final = sa.LargeBinary(limits.PAYLOAD_BYTES_MAX)

_schema = sa.MetaData()
_version = sa.Table("schema_version", _schema, sa.Column("version", sa.Integer, nullable=False))
_federations = sa.Table(
    "federations",
    _schema,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("rounds_done", sa.Integer, nullable=False),
    sa.Column("memory_specs", _Bytes),  # of the server's step
    sa.Column("memory", _Bytes),
    sa.Column("wish", sa.String(16), nullable=False, default=Wish.RUN.value),
    sa.Column("roll_back_to", sa.Integer),
)
# Base versions by the rounds done at them; the current one is that of `rounds_done`.
_bases = sa.Table(
    "bases",
    _schema,
    sa.Column("federation", sa.ForeignKey("federations.name"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("version", sa.LargeBinary, nullable=False),
    sa.Column("base_specs", _Bytes, nullable=False),
    sa.Column("base", _Bytes, nullable=False),
)
_rounds = sa.Table(
    "rounds",
    _schema,
    sa.Column("federation", sa.ForeignKey("federations.name"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("base_version", sa.LargeBinary, nullable=False),
    sa.Column("opened_at", sa.Double, nullable=False),
    sa.Column("deadline_at", sa.Double, nullable=False),
    sa.Column("closed_at", sa.Double),
    sa.Column("outcome", sa.String(16)),
    sa.Column("reports", sa.Integer),
    sa.Column("new_version", sa.LargeBinary),
)
_members = sa.Table(
    "members",
    _schema,
    sa.Column("assignment", sa.String(64), primary_key=True),
    sa.Column("federation", sa.String(128), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("device", sa.String(64), nullable=False),
    sa.Index("members_of_round", "federation", "number", "attempt"),
)
_reports = sa.Table(
    "reports",
    _schema,
    sa.Column("assignment", sa.ForeignKey("members.assignment"), primary_key=True),
    sa.Column("received_at", sa.Double, nullable=False),
    sa.Column("report", _Bytes, nullable=False),
    sa.Column("update_bytes", _Bytes),  # dropped when the round is closed
)

_IS_CURRENT: Final = sa.and_(
    _bases.c.federation == _federations.c.name, _bases.c.number == _federations.c.rounds_done
)
_IS_OPEN: Final = _rounds.c.outcome.is_(None)
_SAME_ROUND: Final = sa.and_(
    _members.c.federation == _rounds.c.federation,
    _members.c.number == _rounds.c.number,
    _members.c.attempt == _rounds.c.attempt,
)


class SqlStore:
    """A store at a database URL, such as `sqlite:////var/lib/pf2lora/store.sqlite`.

    Args:
        url: any that SQLAlchemy takes.
        create: make a store where there is none; otherwise that is an error.

    Raises:
        StoreError: it cannot be opened, is damaged, or was written by a newer version.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self._label = "the store"
        with self._translated():
            address = sa.make_url(url)
            self._label = f"the store {address}"  # SQLAlchemy hides a password in this form
            self._engine = _engine(address, create)
        try:
            with self._begin() as db:
                self._check_version(db, create)
        except BaseException:
            self._engine.dispose()
            raise

    def create(self, settings: FederationSettings, start: NamedTensors) -> None:
        with self._begin() as db:
            db.execute(
                _federations.insert().values(
                    name=settings.name,
                    settings=settings_to_json(settings),
                    rounds_done=0,
                )
            )
            self._keep_base(db, settings.name, 0, start)

    def load(self, federation: str) -> Snapshot | None:
        with self._begin() as db:
            row = db.execute(
                sa.select(_federations, _bases.c.base_specs, _bases.c.base)
                .join(_bases, _IS_CURRENT)
                .where(_federations.c.name == federation)
            ).first()
            if row is None:
                return None
            attempts = db.execute(
                sa.select(_rounds.c.number, sa.func.max(_rounds.c.attempt).label("attempt"))
                .where(_rounds.c.federation == federation, _rounds.c.number > row.rounds_done)
                .group_by(_rounds.c.number)
            )
            open_round = self._open_round(db, federation)
            reported = self._reported(db, federation, open_round) if open_round else frozenset()
            asked = db.execute(
                sa.select(_members.c.device, sa.func.max(_members.c.number).label("number"))
                .where(_members.c.federation == federation)
                .group_by(_members.c.device)
            )
            return Snapshot(
                settings_from_json(row.settings),
                row.rounds_done,
                {one.number: one.attempt for one in attempts},
                _tensors(_decoded(row.base_specs, Assignment).payload, row.base),
                open_round,
                reported,
                {row.device: row.number for row in asked},
                _tensors(_decoded(row.memory_specs, Assignment).payload, row.memory)
                if row.memory_specs
                else None,
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

    def keep_report(self, federation: str, record: ReportRecord) -> bool:
        assignment, payload = record.assignment, record.update.payload()
        message = Report(assignment, bytes(32), record.examples, record.metrics, payload)
        wanted = (_members.c.federation == federation, _members.c.assignment == assignment)
        is_open = sa.select(_rounds.c.number).join(_members, _SAME_ROUND).where(*wanted, _IS_OPEN)
        is_kept = sa.select(_reports.c.assignment).where(_reports.c.assignment == assignment)
        with self._begin() as db:
            if db.scalar(is_open) is None:
                raise StoreError(f"{self._label}: assignment {assignment} is of no open round")
            if db.scalar(is_kept) is not None:
                return False
            db.execute(
                _reports.insert().values(
                    assignment=assignment,
                    received_at=record.received_at,
                    report=codec.encode(message),
                    update_bytes=bytes(record.update.buffer),
                )
            )
        return True

    def reports(self, federation: str, number: int, attempt: int) -> Iterator[ReportRecord]:
        chosen = (
            sa.select(_reports.c.assignment)
            .join(_members)
            .where(*_of_round(_members, federation, number, attempt))
            .where(_reports.c.update_bytes.is_not(None))
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
                record = ReportRecord(
                    assignment,
                    row.device,
                    number,
                    attempt,
                    report.examples,
                    report.metrics,
                    row.received_at,
                    _tensors(report.payload, row.update_bytes),
                )
            yield record

    def blocks(
        self, federation: str, number: int, attempt: int, begin: int, end: int
    ) -> list[bytes]:
        part = sa.func.substr(_reports.c.update_bytes, begin + 1, end - begin)
        chosen = (
            sa.select(part)
            .join(_members)
            .where(*_of_round(_members, federation, number, attempt))
            .where(_reports.c.update_bytes.is_not(None))
            .order_by(_reports.c.assignment)
        )
        with self._begin() as db:
            return [bytes(block) for block in db.scalars(chosen)]

    def has_report(self, federation: str, assignment: str) -> bool:
        kept = sa.select(_reports.c.assignment).join(_members)
        wanted = (_members.c.federation == federation, _members.c.assignment == assignment)
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
        members = sa.select(_members.c.assignment).where(
            *_of_round(_members, federation, number, attempt)
        )
        of_round = _reports.c.assignment.in_(members)
        with self._begin() as db:
            count = db.scalar(sa.select(sa.func.count()).select_from(_reports).where(of_round))
            db.execute(_reports.update().where(of_round).values(update_bytes=None))
            closed = db.execute(
                _rounds.update()
                .where(*_of_round(_rounds, federation, number, attempt), _IS_OPEN)
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
                    _federations.update()
                    .where(_federations.c.name == federation)
                    .values(
                        rounds_done=number,
                        **(_columns("memory", memory) if memory else {}),
                    )
                )
                self._keep_base(db, federation, number, new_base)

    def control(self, federation: str) -> Control:
        with self._begin() as db:
            row = db.execute(
                sa.select(_federations.c.wish, _federations.c.roll_back_to).where(
                    _federations.c.name == federation
                )
            ).first()
            return Control(Wish(row.wish), row.roll_back_to) if row else Control()

    def set_control(self, federation: str, control: Control) -> None:
        with self._begin() as db:
            changed = db.execute(
                _federations.update()
                .where(_federations.c.name == federation)
                .values(wish=control.wish.value, roll_back_to=control.roll_back_to)
            )
            if changed.rowcount != 1:
                raise StoreError(f"{self._label}: there is no federation {federation!r}")

    def bases(self, federation: str) -> list[BaseRecord]:
        with self._begin() as db:
            rows = db.execute(
                sa.select(_bases.c.number, _bases.c.version)
                .where(_bases.c.federation == federation)
                .order_by(_bases.c.number)
            )
            return [BaseRecord(row.number, row.version) for row in rows]

    def roll_back(self, federation: str, number: int) -> Snapshot:
        with self._begin() as db:
            kept = db.execute(
                sa.select(_bases.c.number).where(
                    _bases.c.federation == federation, _bases.c.number == number
                )
            ).first()
            if kept is None:
                raise StoreError(f"{self._label}: no base version of round {number} is kept")
            if self._open_round(db, federation):
                raise StoreError(f"{self._label}: a round is open")
            later = (_bases.c.federation == federation, _bases.c.number > number)
            db.execute(_bases.delete().where(*later))
            db.execute(
                _federations.update()
                .where(_federations.c.name == federation)
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
            sa.select(_rounds)
            .where(_rounds.c.federation == federation, ~_IS_OPEN)
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

    def check(self) -> list[str]:
        """Read everything that a restart would need; the federations that are sound.

        Raises:
            StoreError: naming what is damaged.
        """
        with self._begin() as db:
            if self._engine.dialect.name == "sqlite":
                found = db.execute(sa.text("PRAGMA integrity_check")).scalars().all()
                broken = db.execute(sa.text("PRAGMA foreign_key_check")).all()
                if found != ["ok"] or broken:
                    problem = found[0] if found != ["ok"] else f"{len(broken)} rows lack a parent"
                    raise StoreError(f"{self._label}: {problem}")
            names = list(db.scalars(sa.select(_federations.c.name).order_by("name")))
        for name in names:
            snapshot = self.load(name)
            if snapshot and snapshot.open_round:
                open_round = snapshot.open_round
                # Each is checked against its digest on the way.
                deque(self.reports(name, open_round.number, open_round.attempt), maxlen=0)
        return names

    def backup(self, target: Path) -> None:
        """Copy the store as it is at one moment into a new file; it may be in use meanwhile.

        Raises:
            StoreError: the file exists, or this database has no such copy.
        """
        if self._engine.dialect.name != "sqlite":
            raise StoreError(f"{self._label}: back it up with the database's own tools")
        if target.exists():
            raise StoreError(f"{target} exists already")
        with self._translated(), self._engine.connect() as connection:
            plain = connection.execution_options(isolation_level="AUTOCOMMIT")
            plain.execute(sa.text("VACUUM INTO :target"), {"target": str(target)})
        target.chmod(0o600)

    def close(self) -> None:
        with self._translated():
            self._engine.dispose()

    # --- inside -------------------------------------------------------------------------------

    def _keep_base(
        self, db: sa.Connection, federation: str, number: int, base: NamedTensors
    ) -> None:
        db.execute(
            _bases.insert().values(
                federation=federation,
                number=number,
                version=base.digest(),
                **_columns("base", base),
            )
        )
        old = (_bases.c.federation == federation, _bases.c.number <= number - BASES_KEPT)
        db.execute(_bases.delete().where(*old))

    @contextlib.contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        with self._translated(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (
            sa.exc.SQLAlchemyError,
            OSError,
            ProtocolError,
            SchemaError,
            ModuleNotFoundError,
        ) as error:
            cause = str(getattr(error, "orig", None) or error).partition("\n")[0]
            kind = StorageFullError if any(text in cause for text in DISK_FULL) else StoreError
            raise kind(f"{self._label}: {cause}") from error

    def _check_version(self, db: sa.Connection, create: bool) -> None:
        known = sa.inspect(db).has_table(_version.name)
        version = db.scalar(sa.select(_version.c.version)) if known else None
        if version is None and not create:
            raise StoreError(f"{self._label} is none of pf2lora's")
        if version is not None and version > SCHEMA_VERSION:
            raise StoreError(
                f"{self._label} has schema version {version}; "
                f"this version of pf2lora knows {SCHEMA_VERSION}"
            )
        # The number goes in last: a store whose making was cut short is made again.
        _schema.create_all(db)
        if version is None:
            db.execute(_version.insert().values(version=SCHEMA_VERSION))

    def _open_round(self, db: sa.Connection, federation: str) -> RoundRecord | None:
        row = db.execute(
            sa.select(_rounds).where(_rounds.c.federation == federation, _IS_OPEN)
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


def _of_round(
    table: sa.Table, federation: str, number: int, attempt: int
) -> tuple[sa.ColumnElement[bool], ...]:
    columns = table.c
    return (
        columns.federation == federation,
        columns.number == number,
        columns.attempt == attempt,
    )


def _columns(name: str, tensors: NamedTensors) -> dict[str, Any]:
    payload = tensors.payload()
    message = Assignment("specs", 1, payload.digest, 0.0, payload)
    return {f"{name}_specs": codec.encode(message), name: bytes(tensors.buffer)}


def _tensors(payload: Payload, data: bytes) -> NamedTensors:
    """The tensors of a row, if they are what was written."""
    if len(data) == payload.size_bytes:
        tensors = NamedTensors(payload.tensors, data)
        if tensors.digest() == payload.digest:
            return tensors
    raise RemoteProtocolError("damaged: tensors that do not match their digest", ErrorCode.DIGEST)


def _decoded(data: bytes, cls: type[Any]) -> Any:
    message = codec.decode(data)
    if not isinstance(message, cls):
        raise RemoteProtocolError(f"a {type(message).__name__} in place of a {cls.__name__}")
    return message


def _engine(address: sa.URL, create: bool) -> sa.Engine:
    if address.get_backend_name() != "sqlite":
        return sa.create_engine(address, poolclass=sa.pool.StaticPool)
    if address.database and address.database != ":memory:":
        path = Path(address.database)
        if create:
            _make_private(path)
        elif not path.exists():
            raise FileNotFoundError("there is no such file")
    # Opened in one thread and closed in another at times, but never used in two at once.
    arguments = {"check_same_thread": False}
    engine = sa.create_engine(address, poolclass=sa.pool.StaticPool, connect_args=arguments)
    sa.event.listen(engine, "connect", _set_up_sqlite)
    return engine


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
