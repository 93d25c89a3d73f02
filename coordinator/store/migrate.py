"""Which schema a store has, and how it comes to have this version's (by Alembic).

A store from before there were migrations has no Alembic table; its own `schema_version` says 1, and
its tables are those of revision 0001. A migration is one transaction: it is done, or nothing is.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from coordinator.errors import StoreError
from coordinator.store.database import Database
from coordinator.store.schema import REVISIONS, schema_version

log = logging.getLogger("pf2lora.coordinator")

MIGRATIONS: Final = Path(__file__).with_name("migrations")
_alembic_version = sa.table("alembic_version", sa.column("version_num"))


def revision_of(db: sa.Connection) -> str | None:
    """The schema revision of a store; None where there is no store."""
    tables = sa.inspect(db)
    if tables.has_table(_alembic_version.name):
        found = db.scalar(sa.select(_alembic_version.c.version_num))
        return str(found) if found else None
    if tables.has_table(schema_version.name) and db.scalar(sa.select(schema_version.c.version)):
        return REVISIONS[0]
    return None


def migrate(database: Database) -> None:
    """Bring a store to this version's schema, or make one.

    Raises:
        StoreError: a newer version of pf2lora wrote it.
    """
    with database.exclusive() as db:
        found = revision_of(db)
        _refuse_newer(database, found)
        if found == REVISIONS[-1]:
            return
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = db
        if found == REVISIONS[0]:
            command.stamp(config, found)
        command.upgrade(config, "head")
    if found:
        log.info("the store's schema: revision %s became %s", found, REVISIONS[-1])


def require_current(database: Database) -> None:
    """Let a command that only looks do so.

    Raises:
        StoreError: there is no store, or one of another revision, which is named.
    """
    with database.begin() as db:
        found = revision_of(db)
    if found is None:
        raise StoreError(f"{database.label} is none of pf2lora's")
    _refuse_newer(database, found)
    if found != REVISIONS[-1]:
        raise StoreError(
            f"{database.label} has schema revision {found}, this version of pf2lora reads "
            f"{REVISIONS[-1]}; `pf2lora-coordinator serve` brings it up to date (back it up first)"
        )


def _refuse_newer(database: Database, found: str | None) -> None:
    if found is not None and found not in REVISIONS:
        raise StoreError(
            f"{database.label} has schema revision {found}; this version of pf2lora knows "
            f"{REVISIONS[-1]} at most: run the version that wrote it, or a newer one"
        )
