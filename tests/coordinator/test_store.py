"""The Store contract, and what the SQL store owes the disk."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coordinator.errors import StoreError
from coordinator.store.base import (
    Member,
    Outcome,
    ReportRecord,
    RoundRecord,
    Store,
)
from coordinator.store.memory import MemoryStore
from coordinator.store.sql import SqlStore
from protocol.federation import WireDtype
from protocol.messages import Metric
from protocol.tensors import NamedTensors
from tests.protocol.samples import SETTINGS

BASE = NamedTensors.from_arrays({"x.A": np.ones((2, 3), np.float32)})
NEXT = NamedTensors.from_arrays({"x.A": np.full((2, 3), 2, np.float32)})
UPDATE = NamedTensors.from_arrays({"x.A": np.full((2, 3), 0.1, np.float32)}, WireDtype.BFLOAT16)


def _round(number: int = 1, attempt: int = 1) -> RoundRecord:
    cohort = tuple(Member(d, f"{number}-{attempt}-{d}") for d in ("a", "b"))
    return RoundRecord(number, attempt, BASE.digest(), 10.0, 70.0, cohort)


def _report(device: str, number: int = 1, attempt: int = 1) -> ReportRecord:
    metrics = (Metric("loss", 0.5),)
    name = f"{number}-{attempt}-{device}"
    return ReportRecord(name, device, number, attempt, 9, metrics, 20.0, UPDATE)


class StoreContract:
    """What every store promises."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        raise NotImplementedError

    def test_an_unknown_federation_is_none(self, store: Store) -> None:
        assert store.load("demo") is None
        assert store.history("demo") == []

    def test_a_new_federation_begins_at_its_start(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        snapshot = store.load("demo")
        assert snapshot is not None
        assert snapshot.settings == SETTINGS
        assert snapshot.base.digest() == BASE.digest()
        assert (snapshot.rounds_done, snapshot.attempt, snapshot.open_round) == (0, 0, None)

    def test_an_open_round_and_its_reports_are_remembered(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", _round())
        assert store.keep_report("demo", _report("b"))
        assert store.keep_report("demo", _report("a"))
        assert not store.keep_report("demo", _report("a"))
        snapshot = store.load("demo")
        assert snapshot is not None
        assert snapshot.open_round == _round()
        assert snapshot.reported == {"1-1-a", "1-1-b"}
        kept = list(store.reports("demo", 1, 1))
        assert [report.device for report in kept] == ["a", "b"]
        assert kept[0].metrics == (Metric("loss", 0.5),)
        assert kept[0].update.specs == UPDATE.specs
        assert bytes(kept[0].update.buffer) == bytes(UPDATE.buffer)

    def test_a_closed_round_moves_the_base_and_an_abandoned_one_does_not(
        self, store: Store
    ) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", _round())
        store.keep_report("demo", _report("a"))
        store.close_round("demo", 1, 1, None, 80.0)
        snapshot = store.load("demo")
        assert snapshot is not None
        assert (snapshot.rounds_done, snapshot.attempt, snapshot.open_round) == (0, 1, None)
        store.open_round("demo", _round(1, 2))
        store.keep_report("demo", _report("a", 1, 2))
        store.keep_report("demo", _report("b", 1, 2))
        store.close_round("demo", 1, 2, NEXT, 90.0)
        snapshot = store.load("demo")
        assert snapshot is not None
        assert (snapshot.rounds_done, snapshot.attempt, snapshot.reported) == (1, 0, frozenset())
        assert snapshot.base.digest() == NEXT.digest()
        outcomes = [(o.number, o.attempt, o.outcome, o.reports) for o in store.history("demo")]
        assert outcomes == [(1, 1, Outcome.ABANDONED, 1), (1, 2, Outcome.AGGREGATED, 2)]

    def test_that_a_report_was_kept_is_known_after_its_round(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", _round())
        assert not store.has_report("demo", "1-1-a")
        store.keep_report("demo", _report("a"))
        assert store.has_report("demo", "1-1-a")
        store.close_round("demo", 1, 1, NEXT, 90.0)
        assert store.has_report("demo", "1-1-a")
        assert not store.has_report("demo", "1-1-b")


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestSqlStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = SqlStore(f"sqlite:///{tmp_path}/deep/store.sqlite")
        yield store
        store.close()

    def test_another_process_finds_all_of_it(self, store: Store, tmp_path: Path) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", _round())
        store.keep_report("demo", _report("a"))
        store.close()
        again = SqlStore(f"sqlite:///{tmp_path}/deep/store.sqlite")
        snapshot = again.load("demo")
        again.close()
        assert snapshot is not None
        assert snapshot.reported == {"1-1-a"}

    def test_only_the_owner_may_read_it(self, store: Store, tmp_path: Path) -> None:
        file = tmp_path / "deep" / "store.sqlite"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "store.sqlite"
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"store\.sqlite"):
        SqlStore(f"sqlite:///{file}")


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(StoreError, match="the store: Could not parse"):
        SqlStore("nonsense")


KEEP_AND_HANG = """
import sys, time
from coordinator.store.sql import SqlStore
from tests.coordinator.test_store import BASE, SETTINGS, _report, _round
store = SqlStore(sys.argv[1])
store.create(SETTINGS, BASE)
store.open_round("demo", _round())
store.keep_report("demo", _report("a"))
print("kept", flush=True)
time.sleep(60)
"""


def test_a_report_that_was_kept_outlives_a_kill(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-c", KEEP_AND_HANG, url], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "kept\n"
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    store = SqlStore(url)
    assert [bytes(report.update.buffer) for report in store.reports("demo", 1, 1)] == [
        bytes(UPDATE.buffer)
    ]
    store.close()
