"""What has been seen of devices and told in rounds: written by the ledger, read by views.py.

None of it decides anything: a lost row costs a number on a page, so it is written in batches and
apart from the store's own transactions. How many reports are kept is counted again after a crash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

import numpy as np
import sqlalchemy as sa

from coordinator.store.rows import decoded
from coordinator.store.schema import (
    members,
    of_round,
    reports,
    round_metrics,
    rounds,
    sightings,
)
from protocol import limits
from protocol.messages import Report

# Of the metrics that devices tell, those with a place of their own.
TOLD: Final = ("loss", "accuracy_common", "accuracy_personal", "rank_min", "rank_max")
# Federations may be open to anyone: of more devices than this the longest unseen are forgotten.
SIGHTINGS_MAX: Final = 100_000
# What devices say is any float: the difference of two beyond this would be none.
METRIC_MAX: Final = 1e300
# Rounds whose metrics are summed up after a restart: those that ended in the second before it.
CATCH_UP_ROUNDS: Final = 5


class DeviceState(Enum):
    """What a device was doing when last heard of."""

    WAITING = "waiting"  # connected, without an assignment
    TRAINING = "training"
    SENDING = "sending"
    RESTING = "resting"  # told to come back later
    FINISHED = "finished"
    REFUSED = "refused"
    AWAY = "away"


@dataclass(slots=True)
class Sighting:
    """What is new of one device since it was last written down; None: nothing."""

    state: DeviceState
    seen_at: float
    round: int | None = None
    examples: int | None = None
    sent_bytes: int = 0
    received_bytes: int = 0
    kept: int = 0
    rejected: int = 0
    late: int = 0
    told: dict[str, float] = field(default_factory=dict)


_ADDED: Final = ("sent_bytes", "received_bytes", "kept", "rejected", "late")
_REPLACED: Final = ("round", "examples")  # where something is new
_OF_DEVICE: Final = sa.and_(
    sightings.c.federation == sa.bindparam("of_federation"),
    sightings.c.device == sa.bindparam("of_device"),
)
_CONNECTED: Final = (DeviceState.WAITING, DeviceState.TRAINING, DeviceState.SENDING)
_IS_CONNECTED: Final = sightings.c.state.in_([state.value for state in _CONNECTED])
_ADD: Final = (
    sightings.update()
    .where(_OF_DEVICE)
    .values(
        {
            "state": sa.bindparam("new_state"),
            "last_seen_at": sa.bindparam("new_seen_at"),
            **{key: sightings.c[key] + sa.bindparam(f"new_{key}") for key in _ADDED},
            **{
                key: sa.func.coalesce(sa.bindparam(f"new_{key}"), sightings.c[key])
                for key in _REPLACED
            },
        }
    )
)
_TELL: Final = (
    sightings.update().where(_OF_DEVICE).values({key: sa.bindparam(f"new_{key}") for key in TOLD})
)


def write_sightings(db: sa.Connection, seen: Mapping[tuple[str, str], Sighting]) -> None:
    """Add what is new to what is known of each (federation, device)."""
    known = _known(db, seen)
    fresh = [
        {
            "federation": federation,
            "device": device,
            "state": sighting.state.value,
            "first_seen_at": sighting.seen_at,
            "last_seen_at": sighting.seen_at,
        }
        for (federation, device), sighting in seen.items()
        if (federation, device) not in known
    ]
    if fresh:
        db.execute(sightings.insert(), fresh)
        _forget_oldest(db)
    rows = [_row(name, sighting) for name, sighting in seen.items()]
    if rows:
        db.execute(_ADD, rows)
    told = [_told_row(name, sighting) for name, sighting in seen.items() if sighting.told]
    if told:
        db.execute(_TELL, told)


def all_away(db: sa.Connection) -> None:
    """No device is connected: the coordinator, which is alone on its store, has just started."""
    db.execute(sightings.update().where(_IS_CONNECTED).values(state=DeviceState.AWAY.value))


def count_kept_again(db: sa.Connection) -> None:
    """Count the reports of devices that were connected when a coordinator was killed.

    The last second's were not written down. Call it before `all_away`; after an orderly end there
    is nothing to count.
    """
    cut_off = sa.select(sightings.c.federation, sightings.c.device).where(_IS_CONNECTED)
    if db.execute(cut_off.limit(1)).first() is None:
        return
    of_member = members.c.federation, members.c.device
    counted = (
        sa.select(*of_member, sa.func.count().label("kept"))
        .join(reports, reports.c.assignment == members.c.assignment)
        .where(sa.tuple_(*of_member).in_(cut_off))
        .group_by(*of_member)
    )
    rows = [
        {"of_federation": row.federation, "of_device": row.device, "new_kept": row.kept}
        for row in db.execute(counted)
    ]
    if rows:
        set_kept = sightings.update().where(_OF_DEVICE).values(kept=sa.bindparam("new_kept"))
        db.execute(set_kept, rows)


def sum_up_round(db: sa.Connection, federation: str, number: int, attempt: int) -> None:
    """Write down the quartiles of what the reports of a round told; again is the same.

    Quartiles and not means: what devices say of themselves is not checked, and one that says
    1e300 must not bend the curve.
    """
    told = sa.select(reports.c.report).where(*of_round(reports, federation, number, attempt))
    values: dict[str, list[float]] = {}
    for row in db.scalars(told):
        for metric in decoded(row, Report).metrics:
            values.setdefault(metric.name, []).append(metric.value)
    db.execute(round_metrics.delete().where(*of_round(round_metrics, federation, number, attempt)))
    # Names are the devices' own: only the commonest are kept.
    names = Counter({name: len(told) for name, told in values.items()})
    rows = [
        _summary(federation, number, attempt, name, values[name])
        for name, _ in names.most_common(limits.METRICS_MAX)
    ]
    if rows:
        db.execute(round_metrics.insert(), rows)


def sum_up_last_rounds(db: sa.Connection, federation: str) -> None:
    """Sum up the rounds that ended shortly before the coordinator did."""
    last = db.execute(
        sa.select(rounds.c.number, rounds.c.attempt)
        .where(rounds.c.federation == federation, rounds.c.reports > 0)
        .order_by(rounds.c.closed_at.desc())
        .limit(CATCH_UP_ROUNDS)
    ).all()
    for number, attempt in last:
        sum_up_round(db, federation, number, attempt)


def _known(
    db: sa.Connection, wanted: Mapping[tuple[str, str], Sighting]
) -> frozenset[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    devices = sorted({device for _, device in wanted})
    for begin in range(0, len(devices), 500):  # SQLite bounds a statement's variables
        some = devices[begin : begin + 500]
        rows = db.execute(
            sa.select(sightings.c.federation, sightings.c.device).where(
                sightings.c.device.in_(some)
            )
        )
        found |= {(row.federation, row.device) for row in rows}
    return frozenset(found)


def _row(name: tuple[str, str], sighting: Sighting) -> dict[str, Any]:
    row = {f"new_{key}": getattr(sighting, key) for key in (*_ADDED, *_REPLACED)}
    federation, device = name
    return {
        **row,
        "of_federation": federation,
        "of_device": device,
        "new_state": sighting.state.value,
        "new_seen_at": sighting.seen_at,
    }


def _told_row(name: tuple[str, str], sighting: Sighting) -> dict[str, Any]:
    federation, device = name
    # What it no longer tells is no longer known.
    told = {f"new_{key}": sighting.told.get(key) for key in TOLD}
    return {**told, "of_federation": federation, "of_device": device}


def _forget_oldest(db: sa.Connection) -> None:
    count = db.scalar(sa.select(sa.func.count()).select_from(sightings)) or 0
    if count <= SIGHTINGS_MAX:
        return
    oldest_kept = db.scalar(
        sa.select(sightings.c.last_seen_at)
        .order_by(sightings.c.last_seen_at.desc())
        .offset(SIGHTINGS_MAX - 1)
        .limit(1)
    )
    db.execute(sightings.delete().where(sightings.c.last_seen_at < oldest_kept))


def _summary(
    federation: str, number: int, attempt: int, name: str, told: Sequence[float]
) -> dict[str, Any]:
    values = np.clip(told, -METRIC_MAX, METRIC_MAX)
    low, median, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {
        "federation": federation,
        "number": number,
        "attempt": attempt,
        "name": name,
        "devices": len(told),
        "low": low,
        "median": median,
        "high": high,
    }
