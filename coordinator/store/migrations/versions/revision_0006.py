"""How many reports of a device came late is counted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    late = sa.Column("late", sa.Integer, nullable=False, server_default="0")
    op.add_column("sightings", late)
