"""The first schema.

Tables may be there already: before there were migrations, making a store could be cut short.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

PAYLOAD_BYTES_MAX: Final = 1 << 30


def upgrade() -> None:
    payload = sa.LargeBinary(PAYLOAD_BYTES_MAX)
    op.create_table(
        "federations",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("rounds_done", sa.Integer, nullable=False),
        sa.Column("memory_specs", payload),
        sa.Column("memory", payload),
        sa.Column("wish", sa.String(16), nullable=False),
        sa.Column("roll_back_to", sa.Integer),
        if_not_exists=True,
    )
    op.create_table(
        "bases",
        sa.Column(
            "federation", sa.String(128), sa.ForeignKey("federations.name"), primary_key=True
        ),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("version", sa.LargeBinary, nullable=False),
        sa.Column("base_specs", payload, nullable=False),
        sa.Column("base", payload, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "rounds",
        sa.Column(
            "federation", sa.String(128), sa.ForeignKey("federations.name"), primary_key=True
        ),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True),
        sa.Column("base_version", sa.LargeBinary, nullable=False),
        sa.Column("opened_at", sa.Double, nullable=False),
        sa.Column("deadline_at", sa.Double, nullable=False),
        sa.Column("closed_at", sa.Double),
        sa.Column("outcome", sa.String(16)),
        sa.Column("reports", sa.Integer),
        sa.Column("new_version", sa.LargeBinary),
        if_not_exists=True,
    )
    op.create_table(
        "members",
        sa.Column("assignment", sa.String(64), primary_key=True),
        sa.Column("federation", sa.String(128), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("device", sa.String(64), nullable=False),
        if_not_exists=True,
    )
    op.create_index(
        "members_of_round", "members", ["federation", "number", "attempt"], if_not_exists=True
    )
    op.create_table(
        "reports",
        sa.Column(
            "assignment", sa.String(64), sa.ForeignKey("members.assignment"), primary_key=True
        ),
        sa.Column("received_at", sa.Double, nullable=False),
        sa.Column("report", payload, nullable=False),
        sa.Column("update_bytes", payload),
        if_not_exists=True,
    )
    version = op.create_table(
        "schema_version", sa.Column("version", sa.Integer, nullable=False), if_not_exists=True
    )
    op.execute(version.delete())
    op.execute(version.insert().values(version=1))
