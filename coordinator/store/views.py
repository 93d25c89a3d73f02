"""What people ask of a store: federations, rounds, devices. Reads only, each answer bounded.

The JSON API, the dashboard and the commands `status` and `watch` show the same views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import sqlalchemy as sa

from coordinator.control import Wish
from coordinator.store.schema import (
    IS_OPEN,
    devices,
    federations,
    members,
    of_round,
    reports,
    round_metrics,
    rounds,
    sightings,
)
from protocol.federation import FederationSettings, settings_from_json

PAGE_MAX: Final = 1000
# Said where a federation has no backbone.
OWN_BACKBONES: Final = "the devices' own backbones"
# The columns that a list of devices can be ordered by.
DEVICE_ORDERS: Final = tuple(column.name for column in sightings.columns)[1:]


@dataclass(frozen=True, slots=True)
class OpenRoundView:
    """The round under way. Times are Unix seconds; `deadline_at` is None where there is none."""

    round: int
    attempt: int
    opened_at: float
    deadline_at: float | None
    cohort: int
    goal: int
    reports: int


@dataclass(frozen=True, slots=True)
class FederationView:
    """Where a federation stands; bytes are those of messages, as devices sent and received them."""

    name: str
    algorithm: str
    backbone: str
    rounds_done: int
    rounds: int
    wish: Wish
    open_round: OpenRoundView | None
    devices: Mapping[str, int]  # by state
    sent_bytes: int
    received_bytes: int
    kept: int
    rejected: int
    late: int


@dataclass(frozen=True, slots=True)
class MetricView:
    """What devices told in a round: the quartiles over so many devices."""

    devices: int
    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True)
class RoundView:
    """A round that is over."""

    round: int
    attempt: int
    outcome: str
    cohort: int
    reports: int
    opened_at: float
    closed_at: float
    metrics: Mapping[str, MetricView]


@dataclass(frozen=True, slots=True)
class DeviceView:
    """What is known of a device; from `loss` on as it tells of itself, None where it does not."""

    device: str
    state: str
    first_seen_at: float
    last_seen_at: float
    round: int | None
    examples: int | None
    sent_bytes: int
    received_bytes: int
    kept: int
    rejected: int
    late: int
    loss: float | None
    accuracy_common: float | None
    accuracy_personal: float | None
    rank_min: float | None
    rank_max: float | None
    standing: str | None  # whether it is let in, see DeviceStatus; None where it has no key


@dataclass(frozen=True, slots=True)
class DevicePage:
    """Some of the devices, and how many there are in all."""

    total: int
    devices: Sequence[DeviceView]


def as_json(view: Any) -> dict[str, Any]:
    """A view as JSON has it."""
    plain = asdict(view)
    if isinstance(view, FederationView):
        plain["wish"] = view.wish.value
    return plain


def all_federations(db: sa.Connection) -> list[FederationView]:
    """Every federation of the store, by name."""
    rows = db.execute(sa.select(federations).order_by(federations.c.name).limit(PAGE_MAX)).all()
    return [_federation(db, row) for row in rows]


def federation_names(db: sa.Connection) -> list[str]:
    """Those of the store, in order."""
    return list(db.scalars(sa.select(federations.c.name).order_by(federations.c.name)))


def settings_of(db: sa.Connection, federation: str) -> FederationSettings:
    """Those of a federation that the store has."""
    row = db.execute(sa.select(federations.c.settings).where(federations.c.name == federation))
    return settings_from_json(row.scalar_one())


def last_rounds(
    db: sa.Connection, federation: str, limit: int, before: int | None = None
) -> list[RoundView]:
    """The last `limit` attempts that are over, oldest first; those before a round, if so asked."""
    chosen = (
        sa.select(rounds)
        .where(rounds.c.federation == federation, ~IS_OPEN)
        .order_by(rounds.c.number.desc(), rounds.c.attempt.desc())
        .limit(min(limit, PAGE_MAX))
    )
    if before is not None:
        chosen = chosen.where(rounds.c.number < before)
    rows = db.execute(chosen).all()[::-1]
    if not rows:
        return []
    first = rows[0].number, rows[-1].number
    metrics = _metrics(db, federation, *first)
    cohorts = _cohorts(db, federation, *first)
    return [
        RoundView(
            row.number,
            row.attempt,
            row.outcome,
            cohorts.get((row.number, row.attempt), 0),
            row.reports,
            row.opened_at,
            row.closed_at,
            metrics.get((row.number, row.attempt), {}),
        )
        for row in rows
    ]


def some_devices(
    db: sa.Connection,
    federation: str,
    *,
    limit: int,
    offset: int = 0,
    order: str = "last_seen_at",
    descending: bool = True,
    state: str | None = None,
    contains: str = "",
) -> DevicePage:
    """A page of a federation's devices; `order` is one of DEVICE_ORDERS; unknown comes last."""
    wanted = [sightings.c.federation == federation]
    if state is not None:
        wanted.append(sightings.c.state == state)
    if contains:
        wanted.append(sightings.c.device.contains(contains, autoescape=True))
    column = sightings.c[order]
    total = db.scalar(sa.select(sa.func.count()).select_from(sightings).where(*wanted))
    rows = db.execute(
        sa.select(sightings, devices.c.status.label("standing"))
        .outerjoin(devices, devices.c.device == sightings.c.device)
        .where(*wanted)
        .order_by(column.is_(None), column.desc() if descending else column, sightings.c.device)
        .limit(min(limit, PAGE_MAX))
        .offset(offset)
    )
    return DevicePage(total or 0, [_device(row) for row in rows])


def _federation(db: sa.Connection, row: sa.Row[Any]) -> FederationView:
    settings = settings_from_json(row.settings)
    counted = db.execute(
        sa.select(
            sightings.c.state,
            sa.func.count().label("devices"),
            *(sa.func.sum(sightings.c[name]).label(name) for name in _TOTALS),
        )
        .where(sightings.c.federation == row.name)
        .group_by(sightings.c.state)
    ).all()
    totals = {name: sum(int(getattr(one, name)) for one in counted) for name in _TOTALS}
    return FederationView(
        row.name,
        settings.algorithm.NAME,
        settings.backbone.name if settings.backbone else OWN_BACKBONES,
        row.rounds_done,
        settings.rounds.count,
        Wish(row.wish),
        _open_round(db, row.name, settings.rounds.goal),
        {one.state: one.devices for one in counted},
        **totals,
    )


_TOTALS: Final = ("sent_bytes", "received_bytes", "kept", "rejected", "late")


def _open_round(db: sa.Connection, federation: str, goal: int) -> OpenRoundView | None:
    row = db.execute(sa.select(rounds).where(rounds.c.federation == federation, IS_OPEN)).first()
    if row is None:
        return None

    def count(table: sa.Table) -> int:
        of_this = of_round(table, federation, row.number, row.attempt)
        return db.scalar(sa.select(sa.func.count()).select_from(table).where(*of_this)) or 0

    return OpenRoundView(
        row.number,
        row.attempt,
        row.opened_at,
        row.deadline_at,
        count(members),
        goal,
        count(reports),
    )


def _metrics(
    db: sa.Connection, federation: str, first: int, last: int
) -> dict[tuple[int, int], dict[str, MetricView]]:
    found: dict[tuple[int, int], dict[str, MetricView]] = {}
    of_these = sa.and_(
        round_metrics.c.federation == federation, round_metrics.c.number.between(first, last)
    )
    for row in db.execute(sa.select(round_metrics).where(of_these)):
        told = found.setdefault((row.number, row.attempt), {})
        told[row.name] = MetricView(row.devices, row.low, row.median, row.high)
    return found


def _cohorts(
    db: sa.Connection, federation: str, first: int, last: int
) -> dict[tuple[int, int], int]:
    counted = (
        sa.select(members.c.number, members.c.attempt, sa.func.count().label("devices"))
        .where(members.c.federation == federation, members.c.number.between(first, last))
        .group_by(members.c.number, members.c.attempt)
    )
    return {(row.number, row.attempt): row.devices for row in db.execute(counted)}


def _device(row: sa.Row[Any]) -> DeviceView:
    return DeviceView(**{name: getattr(row, name) for name in (*DEVICE_ORDERS, "standing")})
