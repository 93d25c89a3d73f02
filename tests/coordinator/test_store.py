"""The Store contract, held by each store."""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coordinator.control import Control, Wish
from coordinator.errors import StoreError
from coordinator.store.base import (
    BASES_KEPT,
    Awaited,
    Member,
    Outcome,
    PartialUpdate,
    ReportRecord,
    RoundRecord,
    Store,
)
from coordinator.store.memory import MemoryStore
from coordinator.store.sql import SqlStore
from protocol.federation import Rounds, WireDtype
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
    return ReportRecord(
        name,
        device,
        number,
        attempt,
        9,
        metrics,
        20.0,
        UPDATE,
        BASE.digest(),
        bytes(range(64)),
    )


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
        assert (snapshot.rounds_done, snapshot.attempts, snapshot.open_round) == (0, {}, None)

    def test_settings_are_changed_in_place(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", _round())
        store.close_round("demo", 1, 1, NEXT, 80.0)
        longer = dataclasses.replace(SETTINGS, rounds=Rounds(count=99))
        store.change_settings(longer)
        snapshot = store.load("demo")
        assert snapshot is not None
        assert (snapshot.settings, snapshot.rounds_done) == (longer, 1)
        with pytest.raises(StoreError, match="there is no federation 'other'"):
            store.change_settings(dataclasses.replace(SETTINGS, name="other"))

    def test_an_open_round_and_its_reports_are_remembered(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", _round())
        assert store.keep_reports("demo", [_report("b")]) == [True]
        assert store.keep_reports("demo", [_report("a"), _report("b")]) == [True, False]
        with pytest.raises(StoreError, match="attempt 2 at round 1 is not open"):
            store.keep_reports("demo", [_report("a", 1, 2)])
        snapshot = store.load("demo")
        assert snapshot is not None
        assert snapshot.open_round == _round()
        assert snapshot.reported == {"1-1-a", "1-1-b"}
        kept = list(store.reports("demo", 1, 1))
        assert [report.device for report in kept] == ["a", "b"]
        assert kept[0].metrics == (Metric("loss", 0.5),)
        assert (kept[0].base_version, kept[0].signature) == (BASE.digest(), bytes(range(64)))
        assert kept[0].update.specs == UPDATE.specs
        assert bytes(kept[0].update.buffer) == bytes(UPDATE.buffer)

    def test_a_closed_round_moves_the_base_and_an_abandoned_one_does_not(
        self, store: Store
    ) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", _round())
        store.keep_reports("demo", [_report("a")])
        store.close_round("demo", 1, 1, None, 80.0)
        snapshot = store.load("demo")
        assert snapshot is not None
        assert (snapshot.rounds_done, snapshot.attempts, snapshot.open_round) == (0, {1: 1}, None)
        store.open_round("demo", _round(1, 2))
        store.keep_reports("demo", [_report("a", 1, 2)])
        store.keep_reports("demo", [_report("b", 1, 2)])
        store.close_round("demo", 1, 2, NEXT, 90.0)
        snapshot = store.load("demo")
        assert snapshot is not None
        assert (snapshot.rounds_done, snapshot.attempts, snapshot.reported) == (1, {}, frozenset())
        assert snapshot.base.digest() == NEXT.digest()
        outcomes = [(o.number, o.attempt, o.outcome, o.reports) for o in store.history("demo")]
        assert outcomes == [(1, 1, Outcome.ABANDONED, 1), (1, 2, Outcome.AGGREGATED, 2)]

    def test_earlier_bases_are_kept_and_gone_back_to(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        for number in range(1, BASES_KEPT + 3):
            store.open_round("demo", _round(number))
            store.close_round("demo", number, 1, NEXT if number > 5 else BASE, 1.0, NEXT)
        kept = store.bases("demo")
        assert [base.number for base in kept] == list(range(3, BASES_KEPT + 3))
        assert kept[-1].version == NEXT.digest()
        store.set_roll_back("demo", 4)
        store.set_wish("demo", Wish.PAUSE)
        assert store.control("demo") == Control(Wish.PAUSE, 4)
        snapshot = store.roll_back("demo", 4)
        assert (snapshot.rounds_done, snapshot.memory) == (4, None)
        assert snapshot.attempts == dict.fromkeys(range(5, BASES_KEPT + 3), 1)
        assert snapshot.base.digest() == BASE.digest()
        assert [base.number for base in store.bases("demo")] == [3, 4]
        assert store.control("demo") == Control(Wish.PAUSE)
        for wrong in (2, 5):
            with pytest.raises(StoreError, match=f"round {wrong} is kept"):
                store.roll_back("demo", wrong)
        store.open_round("demo", _round(5, 2))
        with pytest.raises(StoreError, match="a round is open"):
            store.roll_back("demo", 4)
        store.close_round("demo", 5, 2, None, 1.0)
        with pytest.raises(StoreError):
            store.open_round("demo", _round(5, 2))

    def test_that_a_report_was_kept_is_known_after_its_round(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", _round())
        assert not store.has_report("demo", "1-1-a")
        store.keep_reports("demo", [_report("a")])
        assert store.has_report("demo", "1-1-a")
        store.close_round("demo", 1, 1, NEXT, 90.0)
        assert store.has_report("demo", "1-1-a")
        assert not store.has_report("demo", "1-1-b")

    def test_an_assignment_added_to_an_open_round_counts_as_the_others(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        with pytest.raises(StoreError, match="attempt 1 at round 1 is not open"):
            store.add_assignment("demo", 1, 1, Member("c", "1-1-c"))
        store.open_round("demo", _round())
        store.add_assignment("demo", 1, 1, Member("c", "1-1-c"))
        with pytest.raises(StoreError):
            store.add_assignment("demo", 1, 1, Member("d", "1-1-c"))
        assert store.keep_reports("demo", [_report("c")]) == [True]
        snapshot = store.load("demo")
        assert snapshot is not None
        assert snapshot.open_round is not None
        assert [member.device for member in snapshot.open_round.cohort] == ["a", "b", "c"]
        assert (snapshot.reported, snapshot.awaited) == (frozenset({"1-1-c"}), ())
        assert snapshot.last_asked["c"] == 1

    def test_what_is_awaited_for_itself_may_count_in_a_later_round(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", RoundRecord(1, 1, BASE.digest(), 10.0, None, ()))
        for device in ("b", "a"):
            member = Member(device, f"1-1-{device}")
            store.add_assignment("demo", 1, 1, member, 50.0)
        with pytest.raises(StoreError, match="there is no assignment 1-1-c"):
            store.keep_reports("demo", [_report("c")])
        assert store.keep_reports("demo", [_report("a")]) == [True]
        store.close_round("demo", 1, 1, NEXT, 20.0)
        store.open_round("demo", RoundRecord(2, 1, NEXT.digest(), 20.0, None, ()))
        store.add_assignment("demo", 2, 1, Member("a", "2-1-a"), 60.0)
        snapshot = store.load("demo")
        assert snapshot is not None
        assert snapshot.awaited == (
            Awaited("a", "2-1-a", 2, 60.0, NEXT.digest()),
            Awaited("b", "1-1-b", 1, 50.0, BASE.digest()),
        )
        assert store.keep_reports("demo", [_report("a", 2)]) == [True]
        stale = dataclasses.replace(_report("b"), round=2, staleness=1)
        assert store.keep_reports("demo", [stale]) == [True]
        assert store.keep_reports("demo", [stale]) == [False]
        assert [report.staleness for report in store.reports("demo", 2, 1)] == [1, 0]
        assert store.staleness("demo", 2, 1) == [1, 0]
        assert len(list(store.blocks("demo", 2, 1, 0, 2))) == 2
        snapshot = store.load("demo")
        assert snapshot is not None
        assert (snapshot.reported, snapshot.awaited) == (frozenset({"1-1-b", "2-1-a"}), ())
        store.close_round("demo", 2, 1, BASE, 30.0)
        assert [outcome.reports for outcome in store.history("demo")] == [1, 2]

    def test_a_rounds_end_ends_what_was_awaited_until_then(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", dataclasses.replace(_round(), deadline_at=None, cohort=()))
        for device, deadline_at in (("a", 50.0), ("b", 70.0)):
            store.add_assignment("demo", 1, 1, Member(device, f"for {device}"), deadline_at)
            store.keep_part("demo", PartialUpdate(f"for {device}", bytes(32), 0, b"some"))
        store.close_round("demo", 1, 1, BASE, closed_at=50.0)
        snapshot = store.load("demo")
        assert snapshot
        assert [awaited.assignment for awaited in snapshot.awaited] == ["for b"]
        assert store.partial_updates("demo") == ["for b"]

    def test_the_next_assignment_and_a_roll_back_end_what_is_awaited(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", RoundRecord(1, 1, BASE.digest(), 10.0, None, ()))
        for name in ("first", "second"):
            store.add_assignment("demo", 1, 1, Member("a", name), 50.0)
        snapshot = store.load("demo")
        assert snapshot is not None
        assert [awaited.assignment for awaited in snapshot.awaited] == ["second"]
        store.close_round("demo", 1, 1, None, 20.0)
        assert store.roll_back("demo", 0).awaited == ()

    def test_base_versions_that_are_kept_are_found_by_digest_and_number(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", _round())
        store.close_round("demo", 1, 1, NEXT, 90.0)
        for base in (BASE, NEXT):
            found = store.base("demo", base.digest())
            assert found is not None
            assert bytes(found.buffer) == bytes(base.buffer)
        assert store.base("demo", bytes(32)) is None
        after = [store.base_after("demo", number) for number in range(3)]
        assert [base and base.digest() for base in after] == [BASE.digest(), NEXT.digest(), None]

    def test_parts_of_an_update_go_with_its_report_or_its_round(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", _round())
        for part in (
            PartialUpdate("1-1-a", b"old", 0, b"abandoned"),
            PartialUpdate("1-1-a", b"new", 0, b"one "),
            PartialUpdate("1-1-a", b"new", 4, b"two "),
            PartialUpdate("1-1-b", b"b", 0, b"other"),
            PartialUpdate("1-2-a", b"x", 0, b"of no open round"),
        ):
            store.keep_part("demo", part)
        assert b"".join(store.parts("demo", "1-1-a", b"new")) == b"one two "
        assert list(store.parts("demo", "1-1-a", b"old")) == []
        assert store.partial_updates("demo") == ["1-1-a", "1-1-b"]
        store.keep_reports("demo", [_report("a")])
        assert store.partial_updates("demo") == ["1-1-b"]
        store.drop_parts("demo", "1-1-b")
        store.keep_part("demo", PartialUpdate("1-1-b", b"b", 0, b"again"))
        store.close_round("demo", 1, 1, NEXT, 90.0)
        assert store.partial_updates("demo") == []


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
        store.keep_reports("demo", [_report("a")])
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
