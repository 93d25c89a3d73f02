"""What has been seen of devices and what rounds told, for people to look at."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "sightings",
        sa.Column("federation", sa.String(128), primary_key=True),
        sa.Column("device", sa.String(64), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("first_seen_at", sa.Double, nullable=False),
        sa.Column("last_seen_at", sa.Double, nullable=False),
        sa.Column("round", sa.Integer),
        sa.Column("examples", sa.Integer),
        sa.Column("sent_bytes", sa.BigInteger, nullable=False),
        sa.Column("received_bytes", sa.BigInteger, nullable=False),
        sa.Column("kept", sa.Integer, nullable=False),
        sa.Column("rejected", sa.Integer, nullable=False),
        sa.Column("loss", sa.Double),
        sa.Column("accuracy_common", sa.Double),
        sa.Column("accuracy_personal", sa.Double),
        sa.Column("rank_min", sa.Double),
        sa.Column("rank_max", sa.Double),
    )
    op.create_table(
        "round_metrics",
        sa.Column("federation", sa.String(128), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("devices", sa.Integer, nullable=False),
        sa.Column("low", sa.Double, nullable=False),
        sa.Column("median", sa.Double, nullable=False),
        sa.Column("high", sa.Double, nullable=False),
    )
