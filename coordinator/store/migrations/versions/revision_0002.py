"""Reports say which round they count in; an assignment may be awaited for itself.

In the asynchronous mode a report counts in a later round than its assignment was given in, rounds
have no deadline and assignments have.
"""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ROUND: Final[dict[str, sa.types.TypeEngine[Any]]] = {
    "federation": sa.String(128),
    "number": sa.Integer(),
    "attempt": sa.Integer(),
}


def upgrade() -> None:
    op.add_column("members", sa.Column("deadline_at", sa.Double))
    op.create_index("members_awaited", "members", ["federation", "deadline_at"])
    with op.batch_alter_table("rounds") as rounds:
        rounds.alter_column("deadline_at", existing_type=sa.Double(), nullable=True)
    for name, kind in ROUND.items():
        op.add_column("reports", sa.Column(name, kind))
    reports = sa.table("reports", *map(sa.column, ("assignment", *ROUND)))
    members = sa.table("members", *map(sa.column, ("assignment", *ROUND)))
    for name in ROUND:
        given = sa.select(members.c[name]).where(members.c.assignment == reports.c.assignment)
        op.execute(reports.update().values({name: given.scalar_subquery()}))
    with op.batch_alter_table("reports") as batch:
        for name, kind in ROUND.items():
            batch.alter_column(name, existing_type=kind, nullable=False)
    op.create_index("reports_of_round", "reports", list(ROUND))
    # Versions from before there were migrations look here, and refuse what is over 1.
    op.execute(sa.table("schema_version", sa.column("version")).update().values(version=2))
