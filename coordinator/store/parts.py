"""Parts of updates that are on their way, in the SQL store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import sqlalchemy as sa

from coordinator.store.base import PartialUpdate
from coordinator.store.database import Database
from coordinator.store.schema import IS_OPEN, SAME_ROUND, members, parts, rounds

# An assignment is awaited with its round, or for itself.
IS_AWAITED: Final = sa.or_(IS_OPEN, members.c.deadline_at.is_not(None))


class PartsTable:
    """What the SQL store promises of them; they go with their report's keeping and their round."""

    database: Database

    def keep_part(self, federation: str, part: PartialUpdate) -> None:
        given = (members.c.federation == federation, members.c.assignment == part.assignment)
        is_awaited = sa.select(members.c.assignment).join(rounds, SAME_ROUND).where(*given)
        with self.database.begin() as db:
            if db.scalar(is_awaited.where(IS_AWAITED)) is None:
                return
            if not part.begin:
                db.execute(parts.delete().where(parts.c.assignment == part.assignment))
            db.execute(
                parts.insert().values(
                    assignment=part.assignment,
                    begin=part.begin,
                    digest=part.digest,
                    data=part.data,
                )
            )

    def parts(self, federation: str, assignment: str, digest: bytes) -> Iterator[bytes]:
        of_update = (
            members.c.federation == federation,
            parts.c.assignment == assignment,
            parts.c.digest == digest,
        )
        chosen = sa.select(parts.c.begin).join(members).where(*of_update).order_by(parts.c.begin)
        with self.database.begin() as db:
            begins = list(db.scalars(chosen))
        for begin in begins:  # one in memory at a time
            one = sa.select(parts.c.data).where(*of_update[1:], parts.c.begin == begin)
            with self.database.begin() as db:
                data = bytes(db.execute(one).scalar_one())
            yield data

    def drop_parts(self, federation: str, assignment: str) -> None:  # noqa: ARG002
        with self.database.begin() as db:
            db.execute(parts.delete().where(parts.c.assignment == assignment))

    def partial_updates(self, federation: str) -> list[str]:
        chosen = sa.select(parts.c.assignment).distinct().join(members)
        with self.database.begin() as db:
            return list(db.scalars(chosen.where(members.c.federation == federation)))

    def drop_unawaited(self, db: sa.Connection, federation: str) -> None:
        """Forget the parts of updates that can no longer be kept."""
        # From the parts, of which there are few: of assignments there are more with every round.
        wanted = sa.or_(IS_AWAITED, members.c.federation != federation)
        given = sa.select(members.c.assignment).join(rounds, SAME_ROUND)
        of_part = members.c.assignment == parts.c.assignment
        db.execute(parts.delete().where(~given.where(of_part, wanted).exists()))
