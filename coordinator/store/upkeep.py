"""What an operator does with a whole store, also while a coordinator runs on it."""

from __future__ import annotations

import os
import secrets
from collections import deque
from pathlib import Path

import sqlalchemy as sa

from coordinator.errors import StoreError
from coordinator.store import views
from coordinator.store.database import PAGES_MAPPED, Database
from coordinator.store.sql import SqlStore


def check(store: SqlStore) -> list[str]:
    """Read everything that a restart or a roll-back would need; the federations that are sound.

    Raises:
        StoreError: naming what is damaged.
    """
    store.database.check_pages(indexes=True)
    with store.database.begin() as db:
        if store.database.is_sqlite:
            orphans = db.execute(sa.text("PRAGMA foreign_key_check")).all()
            if orphans:
                raise StoreError(f"{store.database.label}: {len(orphans)} rows lack a parent")
        names = views.federation_names(db)
    for name in names:
        for base in store.bases(name):
            store.base_after(name, base.number)
        snapshot = store.load(name)
        if snapshot and snapshot.open_round:
            open_round = snapshot.open_round
            # Each is checked against its digest on the way.
            deque(store.reports(name, open_round.number, open_round.attempt), maxlen=0)
    return names


def backup(database: Database, target: Path) -> None:
    """Copy a store of any revision as it is at one moment; it may be in use meanwhile.

    The copy is whole and on the disk, or it is not there.

    Raises:
        StoreError: the file exists or cannot be written, or this database has no such copy.
    """
    if not database.is_sqlite:
        raise StoreError(f"{database.label}: back it up with the database's own tools")
    if target.exists():
        raise StoreError(f"{target} exists already")
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        # Made beforehand, so that nobody else may ever read it; SQLite takes an empty file.
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "rb") as file:
            with database.plain() as db:
                # For the copy, as if it were new; said of a store that has it, it would be written.
                if not db.scalar(sa.text("PRAGMA auto_vacuum")):
                    db.execute(sa.text(f"PRAGMA auto_vacuum={PAGES_MAPPED}"))
                db.execute(sa.text("VACUUM INTO :target"), {"target": str(partial)})
            os.fsync(file.fileno())
        partial.rename(target)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror}") from error
    except StoreError as error:
        if "disk is full" in str(error):  # SQLite says it of the store, which is read alone
            raise StoreError(f"{target} cannot be written: its disk is full") from error
        raise
    finally:
        partial.unlink(missing_ok=True)
        partial.with_name(f"{partial.name}-journal").unlink(missing_ok=True)
