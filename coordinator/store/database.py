"""A database as a store needs it: opened safely, its faults told as StoreError.

SQLite runs in WAL mode with synchronous=FULL: a transaction that has returned is on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

import sqlalchemy as sa
from alembic.util import CommandError

from coordinator.errors import StoreError
from protocol.errors import ProtocolError
from protocol.scalars import SchemaError

SQLITE: Final = "sqlite:///"
# Updates are large: large pages make them cheaper to write and to read parts of.
PAGE_BYTES: Final = 16384
WAL_BYTES: Final = 16 << 20
# SQLite's map of which page follows which, which is all that is wanted of it: nothing is vacuumed.
# Without it, each of an update's pages is read for the number of the next, also to delete it.
PAGES_MAPPED: Final = "INCREMENTAL"
# Whoever asks `is_coordinated` has the lock for a moment: one that is taken is tried again.
LOCK_TRIES: Final = 5
LOCK_AGAIN_S: Final = 0.02
NOT_WRITABLE: Final = ("readonly database", "unable to open database file")


class Database:
    """A database at a URL; `label` names it in errors.

    Args:
        url: any that SQLAlchemy takes; what follows `sqlite:///` is a file's path as it is.
        create: make a SQLite file where there is none; otherwise that is an error.
        sole: no other process may open it so until this one closes it, or ends.

    Raises:
        StoreError: the URL is none, there is no such file, or another process has it for itself.
    """

    def __init__(self, url: str, *, create: bool, sole: bool = False) -> None:
        self.label = "the store"
        self._lock: int | None = None
        try:
            address = address_of(url)
        except sa.exc.ArgumentError:  # it may still hold a password: not shown
            problem = "this is no database URL, such as sqlite:///pf2lora.sqlite"
            raise StoreError(f"{self.label}: {problem}") from None
        with self.translated():
            # SQLAlchemy hides a password in this form.
            self.label = f"the store {url if url.startswith(SQLITE) else address}"
            self._engine = _engine(address, create)
            self._path = _file(address)
            if sole:
                self._lock = _lock(self._path)
                self._identity = _identity(self._path)

    @property
    def is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    @property
    def is_coordinated(self) -> bool | None:
        """Whether a process has it for itself now; None where that cannot be known."""
        if self._path is None:
            return None
        try:
            lock = os.open(_lock_file(self._path), os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError:  # another user's, as a rule
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # of a file system without locks
            return None
        finally:
            os.close(lock)
        return False

    @contextlib.contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction: on the disk when it is left, or undone by an error."""
        with self.translated():
            self._check_place()
            with self._engine.begin() as connection:
                yield connection

    @contextlib.contextmanager
    def plain(self) -> Iterator[sa.Connection]:
        """A connection without a transaction of its own."""
        with self.translated(), self._engine.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[sa.Connection]:
        """A transaction that can change tables, alone on the database from its beginning."""
        if not self.is_sqlite:
            with self.begin() as connection:
                yield connection
            return
        with self.plain() as connection:  # sqlite3 by itself begins none before a CREATE
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.exec_driver_sql("ROLLBACK")
                raise
            connection.exec_driver_sql("COMMIT")

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Faults of the database, and of what it holds, as StoreError."""
        try:
            yield
        except (
            sa.exc.SQLAlchemyError,
            sqlite3.Error,
            OSError,
            ProtocolError,
            SchemaError,
            ModuleNotFoundError,
            CommandError,
        ) as error:
            cause = str(getattr(error, "orig", None) or error).partition("\n")[0]
            if isinstance(error, ModuleNotFoundError):  # the driver of another database
                cause = (
                    "is none that this can be; use a SQLite file, such as sqlite:///pf2lora.sqlite"
                )
            if any(text in cause for text in NOT_WRITABLE):
                cause += "; the file and its folder must be writable"
            raise StoreError(f"{self.label}: {cause}") from error

    def slices(
        self, db: sa.Connection, chosen: sa.Select[Any], begin: int, end: int
    ) -> Iterator[bytes]:
        """Bytes `[begin, end)` of each blob of a query for one column of them."""
        (column,) = chosen.selected_columns
        if not self.is_sqlite:
            parts = chosen.with_only_columns(sa.func.substr(column, begin + 1, end - begin))
            yield from map(bytes, db.scalars(parts.execution_options(yield_per=16)))
            return
        # SQLite's substr reads all of a blob; where one is opened, what is wanted is read.
        sqlite, table = cast(sqlite3.Connection, db.connection.driver_connection), column.table.name
        rows: sa.Select[Any] = chosen.with_only_columns(sa.literal_column(f"{table}.rowid"))
        for row in db.scalars(rows).all():
            with sqlite.blobopen(table, column.name, row, readonly=True) as blob:
                yield bytes(blob[begin:end])

    def check_pages(self, *, indexes: bool) -> None:
        """Read the whole file: whether each page is one, and belongs where it is.

        It takes as long as reading the file does; with `indexes`, whether these agree with their
        tables, two times that. What a sound page says is not looked at: tensors have digests.

        Raises:
            StoreError: naming the first that is damaged.
        """
        if not self.is_sqlite:
            return
        with self.begin() as db:
            name = "integrity_check" if indexes else "quick_check"
            found = str(db.scalar(sa.text(f"PRAGMA {name}(1)")))
        if found != "ok":
            problem = found.splitlines()[-1]
            raise StoreError(
                f"{self.label}: damaged: {problem}; put a backup in its place, and remove the -wal "
                "and -shm files beside it first: they would damage that too"
            )

    def _check_place(self) -> None:
        # SQLite would write on, into a file that has no name and goes with this process.
        if self._lock is not None and _identity(self._path) != self._identity:
            raise OSError("its file was removed or replaced while in use; stop first, then move it")

    def close(self) -> None:
        with self.translated():
            self._engine.dispose()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None


def address_of(url: str) -> sa.URL:
    """What a URL names. SQLAlchemy would take `?` in a SQLite file's path for the path's end.

    Raises:
        sqlalchemy.exc.ArgumentError: it is no database URL.
    """
    if url.startswith(SQLITE):
        return sa.URL.create("sqlite", database=url.removeprefix(SQLITE))
    return sa.make_url(url)


def _identity(path: Path | None) -> tuple[int, int] | None:
    """Which file a path names, if any."""
    try:
        found = path.stat() if path else None
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if found else None


def _lock_file(path: Path) -> Path:
    # A file of its own: closing the database's would let go SQLite's locks on it. By whatever name
    # a store is reached, it has one.
    path = path.resolve()
    return path.with_name(f"{path.name}.lock")


def _lock(path: Path | None) -> int:
    """Hold a file's lock, which the system lets go with the process, however that ends."""
    if path is None:
        raise OSError("only a SQLite file can be kept for one coordinator alone")
    lock = os.open(_lock_file(path), os.O_RDWR | os.O_CREAT, 0o600)
    for tries_left in reversed(range(LOCK_TRIES)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not tries_left:
                os.close(lock)
                raise OSError("another coordinator is running on it") from None
            time.sleep(LOCK_AGAIN_S)
    return lock


def _file(address: sa.URL) -> Path | None:
    is_file = address.get_backend_name() == "sqlite" and address.database != ":memory:"
    return Path(address.database) if is_file and address.database else None


def _engine(address: sa.URL, create: bool) -> sa.Engine:
    if address.get_backend_name() != "sqlite":
        return sa.create_engine(address, poolclass=sa.pool.StaticPool)
    path = _file(address)
    if path is not None:
        if create:
            _make_private(path)
        elif not path.is_file():
            raise FileNotFoundError("there is no such file")
    # Opened in one thread and closed in another at times, but never used in two at once.
    arguments = {"check_same_thread": False}
    engine = sa.create_engine(address, poolclass=sa.pool.StaticPool, connect_args=arguments)
    sa.event.listen(engine, "connect", _set_up_sqlite)
    # Who only looks leaves a file as it is: a backup may be on a medium that is read-only.
    if create:
        sa.event.listen(engine, "connect", _make_wal)
    return engine


def _make_private(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path.parent} is no folder") from None
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _set_up_sqlite(connection: Any, _: object) -> None:
    for pragma in (
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=10000",
        f"wal_autocheckpoint={WAL_BYTES // PAGE_BYTES}",
        "secure_delete=OFF",  # some builds write zeros over what is deleted: each update twice
    ):
        connection.execute(f"PRAGMA {pragma}")


def _make_wal(connection: Any, _: object) -> None:
    if connection.execute("PRAGMA page_count").fetchone() == (0,):  # an older file keeps its own
        connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
        connection.execute(f"PRAGMA auto_vacuum={PAGES_MAPPED}")
    connection.execute("PRAGMA journal_mode=WAL")  # writes a new file's first page
