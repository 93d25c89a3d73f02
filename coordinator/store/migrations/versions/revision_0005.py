"""Devices and tokens have tables; reports are kept with their round, base version and signature.

A report is kept as the message of protocol version 2, which has a round and a signature. Those from
before have no signature (zeros), and no base version that was remembered.
"""

from __future__ import annotations

import msgpack
import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "devices",
        sa.Column("device", sa.String(64), primary_key=True),
        sa.Column("key", sa.LargeBinary(32), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
        sa.Column("rejected", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_index("devices_by_status", "devices", ["status"])
    op.create_table(
        "tokens",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.Column("used_by", sa.String(64)),
    )
    reports = sa.table("reports", *map(sa.column, ("assignment", "report")))
    members = sa.table("members", *map(sa.column, ("assignment", "number")))
    given = reports.join(members, reports.c.assignment == members.c.assignment)
    db = op.get_bind()
    rows = sa.select(reports.c.assignment, reports.c.report, members.c.number).select_from(given)
    for assignment, report, number in db.execute(rows).all():
        change = reports.update().where(reports.c.assignment == assignment)
        db.execute(change.values(report=_as_version_2(report, number)))


def _as_version_2(report: bytes, number: int) -> bytes:
    """The message with its round, third, and an empty signature, last."""
    code, assignment, *rest = msgpack.unpackb(report)
    packed: bytes = msgpack.packb([code, assignment, number, *rest, bytes(64)])
    return packed
