"""The DeviceStore contract, on both stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.store.base import Member, RoundRecord, Store
from coordinator.store.devices import (
    DeviceRecord,
    DeviceStatus,
    DeviceStore,
    TokenRecord,
    TokenUse,
    token_digest,
)
from coordinator.store.memory import MemoryStore
from coordinator.store.sql import SqlStore
from tests.coordinator.test_store import BASE
from tests.protocol.samples import SETTINGS

ONE = DeviceRecord("aa", bytes(32), DeviceStatus.PENDING, 10.0)
TWO = DeviceRecord("bb", b"\x01" * 32, DeviceStatus.OPEN, 20.0)


def _status_after(devices: DeviceStore, device: str, quarantine_after: int) -> DeviceStatus | None:
    """What a device is after one more rejected report."""
    found = devices.count_rejection(device, "NaN", quarantine_after)
    return None if found is None else found.status


class DeviceStoreContract:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        raise NotImplementedError

    @pytest.fixture
    def devices(self, store: Store) -> DeviceStore:
        return store.devices

    def test_what_was_added_is_found(self, devices: DeviceStore) -> None:
        assert devices.find("aa") is None
        devices.add(TWO)
        devices.add(ONE)
        assert devices.find("aa") == ONE
        assert devices.all() == [ONE, TWO]

    def test_a_device_is_approved_revoked_and_approved_again(self, devices: DeviceStore) -> None:
        assert not devices.set_status("aa", DeviceStatus.APPROVED, "")
        devices.add(ONE)
        assert devices.set_status("aa", DeviceStatus.REVOKED, "lost")
        assert devices.barred() == {"aa": replace(ONE, status=DeviceStatus.REVOKED, reason="lost")}
        assert devices.set_status("aa", DeviceStatus.APPROVED, "")
        assert devices.find("aa") == replace(ONE, status=DeviceStatus.APPROVED)
        assert devices.barred() == {}

    def test_a_token_enrols_one_device_in_its_time(self, devices: DeviceStore) -> None:
        devices.add_tokens(["secret"], 100.0)
        approved = replace(ONE, status=DeviceStatus.APPROVED)
        assert devices.enrol(approved, "other", 50.0) is TokenUse.UNKNOWN
        assert devices.enrol(approved, "secret", 100.0) is TokenUse.EXPIRED
        assert devices.all() == []
        assert devices.enrol(approved, "secret", 99.0) is TokenUse.ACCEPTED
        assert devices.find("aa") == approved
        assert devices.enrol(replace(TWO), "secret", 99.0) is TokenUse.USED
        assert devices.find("bb") is None

    def test_a_token_that_was_revoked_enrols_nobody(self, devices: DeviceStore) -> None:
        devices.add_tokens(["used", "leaked"], 100.0)
        devices.add_tokens(["good"], 90.0)
        devices.enrol(ONE, "used", 50.0)
        good, *others = devices.tokens()
        assert good == TokenRecord(token_digest("good"), 90.0)
        used = TokenRecord(token_digest("used"), 100.0, "aa")
        assert sorted(others, key=str) == sorted(
            [used, TokenRecord(token_digest("leaked"), 100.0)], key=str
        )
        devices.revoke_tokens([token_digest("leaked"), token_digest("used"), token_digest("none")])
        assert devices.tokens() == [good, used]
        assert devices.enrol(TWO, "leaked", 50.0) is TokenUse.UNKNOWN
        assert devices.enrol(TWO, "good", 50.0) is TokenUse.ACCEPTED

    def test_a_token_enrols_a_device_that_was_pending(self, devices: DeviceStore) -> None:
        devices.add(ONE)
        devices.add_tokens(["secret"], 100.0)
        approved = replace(ONE, status=DeviceStatus.APPROVED)
        assert devices.enrol(approved, "secret", 50.0) is TokenUse.ACCEPTED
        assert devices.all() == [approved]

    def test_old_pending_keys_are_forgotten_and_others_are_not(self, devices: DeviceStore) -> None:
        later = replace(ONE, device="cc", seen_at=30.0)
        for record in (ONE, TWO, later):
            devices.add(record)
        assert devices.count_pending(30.0) == 1
        assert devices.all() == [TWO, later]

    def test_repeated_rejections_quarantine_until_approval(self, devices: DeviceStore) -> None:
        devices.add(TWO)
        assert _status_after(devices, "bb", 2) is DeviceStatus.OPEN
        found = devices.count_rejection("bb", "shape", 2)
        quarantined = DeviceStatus.QUARANTINED
        assert found == replace(TWO, status=quarantined, rejected=2, reason="shape")
        assert devices.barred() == {"bb": found}
        devices.set_status("bb", DeviceStatus.APPROVED, "")
        assert devices.find("bb") == replace(TWO, status=DeviceStatus.APPROVED)
        assert _status_after(devices, "bb", 0) is DeviceStatus.APPROVED

    def test_a_revoked_device_does_not_become_quarantined(self, devices: DeviceStore) -> None:
        devices.add(replace(ONE, status=DeviceStatus.REVOKED))
        assert _status_after(devices, "aa", 1) is DeviceStatus.REVOKED

    def test_the_oldest_newcomers_are_forgotten_and_nobody_else(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", RoundRecord(1, 1, bytes(32), 0.0, 9.0, (Member("asked", "x"),)))
        open_ = [
            replace(TWO, device=name, seen_at=float(number))
            for number, name in enumerate(("asked", "bad", "first", "second", "third"))
        ]
        others = [
            replace(ONE, device=status.value, status=status, seen_at=0.0)
            for status in DeviceStatus
            if status is not DeviceStatus.OPEN
        ]
        for record in (*open_, *others):
            store.devices.add(record)
        store.devices.count_rejection("bad", "NaN", 0)
        assert store.devices.forget_newcomers(2) == 1
        kept = {record.device for record in store.devices.all()}
        assert kept == {record.device for record in (*open_, *others)} - {"first"}
        assert store.devices.forget_newcomers(0) == 2
        assert store.devices.forget_newcomers(0) == 0
        assert kept - {r.device for r in store.devices.all()} == {"second", "third"}

    def test_a_device_that_was_asked_does_not_wait_in_vain(self, store: Store) -> None:
        store.create(SETTINGS, BASE)
        store.open_round("demo", RoundRecord(1, 1, bytes(32), 0.0, 9.0, (Member("aa", "x"),)))
        store.devices.add(ONE)
        assert store.devices.count_pending(1e6) == 1


class TestMemoryDevices(DeviceStoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestSqlDevices(DeviceStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = SqlStore(f"sqlite:///{tmp_path}/store.sqlite")
        yield store
        store.close()

    def test_a_token_is_nowhere_in_the_file(self, devices: DeviceStore, tmp_path: Path) -> None:
        devices.add_tokens(["not-to-be-found"], 100.0)
        for file in tmp_path.iterdir():
            assert b"not-to-be-found" not in file.read_bytes()

    def test_two_coordinators_of_one_file_use_a_token_once(
        self, devices: DeviceStore, tmp_path: Path
    ) -> None:
        other = SqlStore(f"sqlite:///{tmp_path}/store.sqlite")
        devices.add_tokens(["secret"], 100.0)
        assert devices.enrol(ONE, "secret", 50.0) is TokenUse.ACCEPTED
        assert other.devices.enrol(TWO, "secret", 50.0) is TokenUse.USED
        other.close()
