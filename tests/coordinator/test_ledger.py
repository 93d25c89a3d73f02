"""What the ledger makes of what it hears, and what the views show of it."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.events import CloseRound
from coordinator.happenings import (
    Acted,
    Disconnected,
    Happening,
    Heard,
    Said,
    all_of,
    observed_store,
)
from coordinator.ledger import Ledger
from coordinator.store import sightings, views
from coordinator.store.base import Member, ReportRecord, RoundRecord
from coordinator.store.memory import MemoryStore
from coordinator.store.sightings import DeviceState
from coordinator.store.sql import SqlStore
from protocol.errors import ErrorCode
from protocol.messages import (
    Assignment,
    CheckIn,
    Finished,
    Joined,
    Message,
    Metric,
    Receipt,
    ReceiptStatus,
    Refusal,
    Report,
    RetryWindow,
)
from protocol.tensors import NamedTensors
from protocol.virtual_time import at_once
from tests.coordinator.busy_store import busy_settings

SETTINGS = busy_settings(0)
BASE = NamedTensors.from_arrays({"x.A": np.ones((2, 3), np.float32)})
PAYLOAD = BASE.payload()
JOINED = Joined(SETTINGS)
CHECK_IN = CheckIn("sha256:" + "a" * 64, 70, 0)
ASSIGNED = Assignment("a-1", 4, bytes(32), 60.0, PAYLOAD)
TOLD = (
    Metric("loss", 0.5),
    Metric("accuracy_common", 0.7),
    Metric("accuracy_personal", 0.8),
    Metric("rank_min", 2.0),
    Metric("rank_max", 5.0),
    Metric("steps", 3.0),
)
REPORT = Report("a-1", 1, bytes(32), 70, TOLD, PAYLOAD, bytes(64))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    with contextlib.closing(SqlStore(f"sqlite:///{tmp_path}/s.sqlite")) as store:
        store.create(SETTINGS, BASE)
        yield store


class Clock:
    now = 100.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def _said(message: Message, device: str = "d") -> Said:
    return Said("reviews", device, message, 10)


def _heard(message: Message, device: str = "d") -> Heard:
    return Heard("reviews", device, message, 3)


def _receipt(status: ReceiptStatus) -> Said:
    return _said(Receipt("a-1", status, ""))


GONE = Disconnected("reviews", "d")


def _after(store: SqlStore, *happenings: Happening) -> views.DevicePage:
    ledger = Ledger(store.database, at_once, Clock())
    for happening in happenings:
        ledger(happening)
    asyncio.run(ledger.write())
    return _devices(store)


def _devices(store: SqlStore, **query: object) -> views.DevicePage:
    with store.database.begin() as db:
        return views.some_devices(db, "reviews", **{"limit": 100, **query})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("happenings", "state"),
    [
        ([_said(JOINED)], DeviceState.WAITING),
        ([_said(JOINED), _heard(CHECK_IN), _said(ASSIGNED)], DeviceState.TRAINING),
        ([_said(JOINED), _heard(REPORT)], DeviceState.SENDING),
        ([_said(JOINED), _heard(REPORT), GONE], DeviceState.AWAY),
        ([_said(JOINED), _said(RetryWindow(1.0, 2.0, "")), GONE], DeviceState.RESTING),
        ([_said(JOINED), _said(Finished(9, bytes(32), PAYLOAD)), GONE], DeviceState.FINISHED),
        ([_said(JOINED), _said(Refusal(ErrorCode.DIGEST, "", 1.0)), GONE], DeviceState.REFUSED),
        # It connected anew before its older connection ended.
        (
            [
                _said(JOINED),
                _said(JOINED),
                _said(Refusal(ErrorCode.SUPERSEDED, "", 1.0)),
                GONE,
                _heard(CHECK_IN),
            ],
            DeviceState.WAITING,
        ),
    ],
)
def test_a_device_is_doing_what_it_was_last_heard_of(
    store: SqlStore, happenings: list[Happening], state: DeviceState
) -> None:
    (device,) = _after(store, *happenings).devices
    assert device.state == state.value


def test_bytes_reports_and_what_is_told_add_up_over_writes(store: SqlStore) -> None:
    trained = (_said(JOINED), _heard(CHECK_IN), _said(ASSIGNED), _heard(REPORT))
    (first,) = _after(store, *trained, _receipt(ReceiptStatus.ACCEPTED), GONE).devices
    assert (first.sent_bytes, first.received_bytes) == (6, 30)
    assert (first.round, first.examples, first.kept, first.rejected) == (4, 70, 1, 0)
    assert (first.loss, first.accuracy_common, first.accuracy_personal) == (0.5, 0.7, 0.8)
    assert (first.rank_min, first.rank_max) == (2.0, 5.0)
    (second,) = _after(store, *trained, _receipt(ReceiptStatus.REJECTED)).devices
    assert (second.sent_bytes, second.kept, second.rejected) == (12, 1, 1)
    assert second.accuracy_personal == 0.8
    assert second.first_seen_at == first.first_seen_at
    (tardy,) = _after(store, *trained, _receipt(ReceiptStatus.LATE)).devices
    assert (tardy.kept, tardy.rejected, tardy.late) == (1, 1, 1)
    silent = replace(REPORT, metrics=(Metric("loss", 0.4),))
    (third,) = _after(
        store, _said(JOINED), _heard(silent), _receipt(ReceiptStatus.ACCEPTED)
    ).devices
    assert (third.loss, third.accuracy_personal, third.rank_max) == (0.4, None, None)


def test_who_never_joined_leaves_no_trace(store: SqlStore) -> None:
    refused = Refusal(ErrorCode.UNKNOWN_FEDERATION, "", 1.0)
    page = _after(store, _said(refused, "stranger"), _heard(CHECK_IN, "stranger"), GONE)
    assert page.total == 0


def test_after_a_restart_nobody_is_connected(store: SqlStore) -> None:
    _after(store, _said(JOINED), _said(ASSIGNED), _said(JOINED, "e"))
    _after(store, _said(JOINED, "f"), _said(Finished(9, bytes(32), PAYLOAD), "f"))
    asyncio.run(Ledger(store.database, at_once).begin(["reviews"]))
    states = {one.device: one.state for one in _devices(store).devices}
    assert states == {"d": "away", "e": "away", "f": "finished"}


def test_after_a_restart_nobody_is_connected_to_a_federation_that_is_not_run_any_more(
    store: SqlStore,
) -> None:
    _after(store, _said(JOINED), _said(ASSIGNED))
    asyncio.run(Ledger(store.database, at_once).begin(["another"]))
    assert [one.state for one in _devices(store).devices] == ["away"]


def test_reports_of_the_second_before_a_crash_are_counted_at_the_next_start(
    store: SqlStore,
) -> None:
    _after(store, _said(JOINED, "0"), _said(JOINED, "1"), _said(JOINED, "idle"))
    _close_round(store, [1.0, 3.0])  # of devices "0" and "1", whose receipts the ledger lost
    for _ in range(2):
        asyncio.run(Ledger(store.database, at_once).begin(["reviews"]))
        kept = {one.device: one.kept for one in _devices(store).devices}
        assert kept == {"0": 1, "1": 1, "idle": 0}


def test_of_too_many_devices_the_longest_unseen_are_forgotten(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sightings, "SIGHTINGS_MAX", 3)
    for name in "abcde":
        with store.database.begin() as db:
            seen = sightings.Sighting(DeviceState.AWAY, float(ord(name)))
            sightings.write_sightings(db, {("reviews", name): seen})
    assert sorted(one.device for one in _devices(store).devices) == ["c", "d", "e"]


def _close_round(store: SqlStore, values: list[float]) -> None:
    cohort = tuple(Member(str(i), f"1-{i}") for i in range(len(values)))
    store.open_round("reviews", RoundRecord(1, 1, BASE.digest(), 10.0, 70.0, cohort))
    for member, value in zip(cohort, values, strict=True):
        told = (Metric("loss", value), *((Metric("own", 1.0),) if value > 2 else ()))
        report = ReportRecord(
            member.assignment, member.device, 1, 1, 9, told, 20.0, BASE, bytes(32), bytes(64)
        )
        store.keep_reports("reviews", [report])
    store.close_round("reviews", 1, 1, BASE, 80.0)


def _round(store: SqlStore) -> views.RoundView:
    with store.database.begin() as db:
        (found,) = views.last_rounds(db, "reviews", 10)
    return found


def test_a_round_is_summed_up_by_quartiles_that_no_single_device_bends(store: SqlStore) -> None:
    _close_round(store, [1.0, 2.0, 3.0, 4.0, 1e300])
    assert _round(store).metrics == {}
    _after(store, Acted("reviews", CloseRound(1, 1, True, 3), 0.1))
    found = _round(store)
    assert found.metrics["loss"] == views.MetricView(5, 2.0, 3.0, 4.0)
    assert found.metrics["own"].devices == 3
    assert (found.cohort, found.reports, found.outcome) == (5, 5, "aggregated")


def test_a_round_that_ended_with_its_coordinator_is_summed_up_at_the_next_start(
    store: SqlStore,
) -> None:
    _close_round(store, [1.0, 3.0])
    for _ in range(2):
        asyncio.run(Ledger(store.database, at_once).begin(["reviews"]))
        assert _round(store).metrics["loss"].median == 2.0


@pytest.mark.parametrize("told", [[1.7e308, -1.7e308], [1.7e308, -1.7e308, -1.7e308]])
def test_the_greatest_metrics_there_are_stop_neither_the_page_nor_the_next_start(
    store: SqlStore, told: list[float]
) -> None:
    _close_round(store, told)
    _after(store, Acted("reviews", CloseRound(1, 1, True, 3), 0.1))
    loss = _round(store).metrics["loss"]
    assert all(map(math.isfinite, (loss.low, loss.median, loss.high)))
    asyncio.run(Ledger(store.database, at_once).begin(["reviews"]))


def test_an_observed_store_gives_and_raises_what_the_store_does() -> None:
    seen: list[str] = []
    store = observed_store(MemoryStore(), lambda happening: seen.append(happening.call))  # type: ignore[union-attr]
    store.create(SETTINGS, BASE)
    assert store.load("reviews") is not None
    with pytest.raises(Exception, match="already"):
        store.create(SETTINGS, BASE)
    assert seen == ["create", "load", "create"]


def test_an_observer_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Happening] = []

    def fail(_: Happening) -> None:
        raise RuntimeError("a fault in it")

    all_of(fail, seen.append)(GONE)
    assert seen == [GONE]
    assert "a fault in it" in caplog.text
