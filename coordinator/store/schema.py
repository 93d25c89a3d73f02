"""The tables of the SQL store, as of the last of its revisions.

What has a fixed form on the wire (metrics, tensor specs) is stored in it, as protocol bytes;
settings by name, so that a version with more of them can read them.
"""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa

from coordinator.control import Wish
from protocol import limits

# All revisions, oldest first; migrations/versions has a file for each.
REVISIONS: Final = ("0001", "0002", "0003", "0004", "0005", "0006")
# A length makes MySQL choose a type that holds this much; the others do not care.
_Bytes: Final = sa.LargeBinary(limits.PAYLOAD_BYTES_MAX)

metadata = sa.MetaData()
# What there was before migrations; versions of that time read it, so it stays.
schema_version = sa.Table(
    "schema_version", metadata, sa.Column("version", sa.Integer, nullable=False)
)
federations = sa.Table(
    "federations",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("rounds_done", sa.Integer, nullable=False),
    sa.Column("memory_specs", _Bytes),  # of the server's step
    sa.Column("memory", _Bytes),
    sa.Column("wish", sa.String(16), nullable=False, default=Wish.RUN.value),
    sa.Column("roll_back_to", sa.Integer),
)
# Base versions by the rounds done at them; the current one is that of `rounds_done`.
bases = sa.Table(
    "bases",
    metadata,
    sa.Column("federation", sa.ForeignKey("federations.name"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("version", sa.LargeBinary, nullable=False),
    sa.Column("base_specs", _Bytes, nullable=False),
    sa.Column("base", _Bytes, nullable=False),
)
rounds = sa.Table(
    "rounds",
    metadata,
    sa.Column("federation", sa.ForeignKey("federations.name"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("base_version", sa.LargeBinary, nullable=False),
    sa.Column("opened_at", sa.Double, nullable=False),
    sa.Column("deadline_at", sa.Double),  # none in the asynchronous mode
    sa.Column("closed_at", sa.Double),
    sa.Column("outcome", sa.String(16)),
    sa.Column("reports", sa.Integer),
    sa.Column("new_version", sa.LargeBinary),
)
members = sa.Table(
    "members",
    metadata,
    sa.Column("assignment", sa.String(64), primary_key=True),
    sa.Column("federation", sa.String(128), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("device", sa.String(64), nullable=False),
    sa.Column("deadline_at", sa.Double),  # while it is awaited for itself
    sa.Index("members_of_round", "federation", "number", "attempt"),
    sa.Index("members_awaited", "federation", "deadline_at"),
)
reports = sa.Table(
    "reports",
    metadata,
    sa.Column("assignment", sa.ForeignKey("members.assignment"), primary_key=True),
    # The round that it counts in.
    sa.Column("federation", sa.String(128), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("received_at", sa.Double, nullable=False),
    sa.Column("report", _Bytes, nullable=False),
    sa.Column("update_bytes", _Bytes),  # dropped when the round is closed
    sa.Index("reports_of_round", "federation", "number", "attempt"),
)
# Updates on their way: gone once the report is kept or the round is over.
parts = sa.Table(
    "parts",
    metadata,
    sa.Column("assignment", sa.ForeignKey("members.assignment"), primary_key=True),
    sa.Column("begin", sa.BigInteger, primary_key=True),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("data", _Bytes, nullable=False),
)
# What has been seen of devices, for people to look at: written late, the last second may be lost.
sightings = sa.Table(
    "sightings",
    metadata,
    sa.Column("federation", sa.String(128), primary_key=True),
    sa.Column("device", sa.String(64), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("first_seen_at", sa.Double, nullable=False),
    sa.Column("last_seen_at", sa.Double, nullable=False),
    sa.Column("round", sa.Integer),  # the last it was assigned to
    sa.Column("examples", sa.Integer),
    sa.Column("sent_bytes", sa.BigInteger, nullable=False, default=0),
    sa.Column("received_bytes", sa.BigInteger, nullable=False, default=0),
    sa.Column("kept", sa.Integer, nullable=False, default=0),  # its reports
    sa.Column("rejected", sa.Integer, nullable=False, default=0),
    sa.Column("late", sa.Integer, nullable=False, server_default="0"),
    sa.Column("loss", sa.Double),  # from here on what the device tells of itself
    sa.Column("accuracy_common", sa.Double),
    sa.Column("accuracy_personal", sa.Double),
    sa.Column("rank_min", sa.Double),
    sa.Column("rank_max", sa.Double),
)
# What the reports of a round that is over told, metric by metric.
round_metrics = sa.Table(
    "round_metrics",
    metadata,
    sa.Column("federation", sa.String(128), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("low", sa.Double, nullable=False),  # the quartiles
    sa.Column("median", sa.Double, nullable=False),
    sa.Column("high", sa.Double, nullable=False),
)
devices = sa.Table(
    "devices",
    metadata,
    sa.Column("device", sa.String(64), primary_key=True),
    sa.Column("key", sa.LargeBinary(32), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("seen_at", sa.Double, nullable=False),
    sa.Column("rejected", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Index("devices_by_status", "status"),
)
tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.Column("used_by", sa.String(64)),
)

IS_CURRENT: Final = sa.and_(
    bases.c.federation == federations.c.name, bases.c.number == federations.c.rounds_done
)
IS_OPEN: Final = rounds.c.outcome.is_(None)
SAME_ROUND: Final = sa.and_(
    members.c.federation == rounds.c.federation,
    members.c.number == rounds.c.number,
    members.c.attempt == rounds.c.attempt,
)


def of_round(
    table: sa.Table, federation: str, number: int, attempt: int
) -> tuple[sa.ColumnElement[bool], ...]:
    """Whether a row is of one attempt at a round."""
    columns = table.c
    return (
        columns.federation == federation,
        columns.number == number,
        columns.attempt == attempt,
    )


def is_awaited(federation: str) -> sa.ColumnElement[bool]:
    """Whether a row of `members` is awaited for itself."""
    return sa.and_(members.c.federation == federation, members.c.deadline_at.is_not(None))


def kept_in(
    column: sa.ColumnElement[Any], federation: str, number: int, attempt: int
) -> sa.Select[Any]:
    """A column of the reports whose updates are there, ordered by assignment."""
    return (
        sa.select(column)
        .select_from(reports.join(members))
        .where(*of_round(reports, federation, number, attempt))
        .where(reports.c.update_bytes.is_not(None))
        .order_by(reports.c.assignment)
    )
