"""Updates that are on their way are kept in parts, to be gone on from."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

PAYLOAD_BYTES_MAX: Final = 1 << 30


def upgrade() -> None:
    op.create_table(
        "parts",
        sa.Column(
            "assignment",
            sa.String(64),
            sa.ForeignKey("members.assignment"),
            primary_key=True,
        ),
        sa.Column("begin", sa.BigInteger, primary_key=True),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("data", sa.LargeBinary(PAYLOAD_BYTES_MAX), nullable=False),
    )
