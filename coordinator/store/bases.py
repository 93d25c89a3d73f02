"""The base versions that are kept, in the SQL store."""

from __future__ import annotations

import sqlalchemy as sa

from coordinator.store import rows
from coordinator.store.base import BASES_KEPT, BaseRecord
from coordinator.store.database import Database
from coordinator.store.schema import bases
from protocol.tensors import NamedTensors


class BasesTable:
    """What the SQL store promises of them; one that is read is checked against its digest."""

    database: Database

    def bases(self, federation: str) -> list[BaseRecord]:
        with self.database.begin() as db:
            kept = db.execute(
                sa.select(bases.c.number, bases.c.version)
                .where(bases.c.federation == federation)
                .order_by(bases.c.number)
            )
            return [BaseRecord(row.number, row.version) for row in kept]

    def base(self, federation: str, version: bytes) -> NamedTensors | None:
        wanted = (bases.c.federation == federation, bases.c.version == version)
        with self.database.begin() as db:
            row = db.execute(sa.select(bases).where(*wanted)).first()
            return rows.base(row) if row else None

    def base_after(self, federation: str, number: int) -> NamedTensors | None:
        with self.database.begin() as db:
            return self.base_in(db, federation, number)

    def keep_base(
        self, db: sa.Connection, federation: str, number: int, base: NamedTensors
    ) -> None:
        """Keep one more, and as many of those before it as there is a way back to."""
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

    def base_in(self, db: sa.Connection, federation: str, number: int) -> NamedTensors | None:
        """As `base_after`, within a transaction."""
        wanted = (bases.c.federation == federation, bases.c.number == number)
        row = db.execute(sa.select(bases).where(*wanted)).first()
        return rows.base(row) if row else None
