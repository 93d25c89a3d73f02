"""`devices list|approve|revoke|token`: what they print, change and refuse."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator import cli
from coordinator.store.devices import DeviceRecord, DeviceStatus, DeviceStore, TokenUse
from coordinator.store.sql import SqlStore

PENDING = DeviceRecord("aa11", bytes(32), DeviceStatus.PENDING, 0.0)
QUARANTINED = DeviceRecord("aa22", b"\x01" * 32, DeviceStatus.QUARANTINED, 86400.0, 3, "NaN")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.sqlite"


@pytest.fixture
def devices(url: str) -> Iterator[DeviceStore]:
    """Those of a store that a coordinator has open meanwhile."""
    with contextlib.closing(SqlStore(url)) as store:
        store.devices.add(PENDING)
        store.devices.add(QUARANTINED)
        yield store.devices


def _run(url: str, action: str, *arguments: str) -> int:
    return cli.main(["devices", action, "--store", url, *arguments])


def test_a_list_has_a_line_a_device(
    url: str, devices: DeviceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(url, "list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "aa11  pending      since 1970-01-01 00:00:00 UTC",
        "aa22  quarantined  since 1970-01-02 00:00:00 UTC  3 rejected  NaN",
    ]
    assert _run(url, "list", "--json") == 0
    _, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert second == {
        "device": "aa22",
        "status": "quarantined",
        "seen_at": 86400.0,
        "rejected": 3,
        "reason": "NaN",
        "key": "01" * 32,
    }


def test_devices_are_approved_and_revoked_by_the_beginning_of_their_ids(
    url: str, devices: DeviceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(url, "approve", "aa1", "aa22") == 0
    assert capsys.readouterr().out == "aa11: approved\naa22: approved\n"
    assert {record.status for record in devices.all()} == {DeviceStatus.APPROVED}
    assert [record.rejected for record in devices.all()] == [0, 0]
    assert _run(url, "revoke", "aa1", "--reason", "lost", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"device": "aa11", "status": "revoked"}
    found = devices.find("aa11")
    assert found is not None
    assert (found.status, found.reason) == (DeviceStatus.REVOKED, "lost")


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        ("bb", "device: the store has no device 'bb'"),
        ("aa", "device: 2 devices begin with 'aa'"),
        ("", "device: is empty; give its id"),
    ],
)
def test_a_device_that_is_not_one_changes_nothing(
    url: str,
    devices: DeviceStore,
    capsys: pytest.CaptureFixture[str],
    chosen: str,
    problem: str,
) -> None:
    assert _run(url, "approve", "aa11", chosen) == 2
    assert problem in capsys.readouterr().err
    assert devices.find("aa11") == PENDING


@pytest.mark.parametrize(("expires", "span_s"), [("90s", 90), ("30m", 1800), ("7d", 604800)])
def test_tokens_are_shown_once_and_each_enrols_one_device_in_time(
    url: str,
    devices: DeviceStore,
    capsys: pytest.CaptureFixture[str],
    expires: str,
    span_s: int,
) -> None:
    before = time.time()
    assert _run(url, "token", "--expires", expires, "--count", "3") == 0
    tokens = capsys.readouterr().out.split()
    assert len(set(tokens)) == 3
    assert min(map(len, tokens)) >= 32
    for number, token in enumerate(tokens[:2]):
        record = DeviceRecord(f"new{number}", bytes(32), DeviceStatus.APPROVED, 0.0)
        assert devices.enrol(record, token, before + span_s - 1) is TokenUse.ACCEPTED
    assert devices.enrol(PENDING, tokens[0], before) is TokenUse.USED
    assert devices.enrol(PENDING, tokens[2], time.time() + span_s) is TokenUse.EXPIRED
    assert _run(url, "token", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["expires_at"] == pytest.approx(time.time() + 3600, abs=60)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--expires", "soon"], "--expires: 'soon' is no span of time, such as 30m, 1h or 7d"),
        (["--expires", "0h"], "--expires: '0h'"),
        (["--count", "0"], "--count: expected 1 to 10000, got 0"),
    ],
)
def test_a_token_that_cannot_be_made_is_named(
    url: str,
    devices: DeviceStore,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    assert _run(url, "token", *arguments) == 2
    assert problem in capsys.readouterr().err


def _made(url: str, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, str]]:
    assert _run(url, "token", "--json", *flags) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_tokens_are_listed_by_their_ids_and_what_became_of_them(
    url: str, devices: DeviceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    devices.add_tokens(["late"], 86400.0)
    used, unused = _made(url, capsys, "--count", "2")
    devices.enrol(PENDING, used["token"], time.time())
    assert _run(url, "list-tokens", "--json") == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {one["id"]: (one["status"], one["device"]) for one in listed} == {
        listed[0]["id"]: ("expired", None),
        used["id"]: ("used", "aa11"),
        unused["id"]: ("unused", None),
    }
    assert _run(url, "list-tokens") == 0
    told = capsys.readouterr().out
    assert f"{listed[0]['id']}  expired  since 1970-01-02 00:00:00 UTC\n" in told
    assert f"{used['id']}  used     by aa11\n" in told
    assert f"{unused['id']}  unused   until 20" in told
    assert unused["token"] not in told


def test_a_leaked_token_is_revoked_by_itself_or_by_its_id(
    url: str, devices: DeviceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    leaked, mistaken, good = _made(url, capsys, "--count", "3")
    assert _run(url, "revoke-token", leaked["token"], mistaken["id"][:10]) == 0
    assert capsys.readouterr().out == f"{leaked['id']}: revoked\n{mistaken['id']}: revoked\n"
    for token in (leaked, mistaken):
        assert devices.enrol(PENDING, token["token"], 0.0) is TokenUse.UNKNOWN
    assert devices.enrol(PENDING, good["token"], 0.0) is TokenUse.ACCEPTED


def test_of_a_token_that_was_used_the_device_is_named_and_the_others_are_revoked(
    url: str, devices: DeviceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    used, unused = _made(url, capsys, "--count", "2")
    devices.enrol(PENDING, used["token"], 0.0)
    assert _run(url, "revoke-token", "--json", used["token"], unused["token"]) == 2
    told = capsys.readouterr()
    assert json.loads(told.out) == {"id": unused["id"], "status": "revoked"}
    assert f"it is the device to revoke: {used['id']} by device aa11" in told.err


def test_all_tokens_that_were_not_used_are_revoked_at_once(
    url: str, devices: DeviceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    used, *_ = _made(url, capsys, "--count", "30")
    devices.enrol(PENDING, used["token"], 0.0)
    for revoked in (29, 0):
        assert _run(url, "revoke-token", "--all") == 0
        assert capsys.readouterr().out.count(": revoked\n") == revoked
    assert [token.used_by for token in devices.tokens()] == ["aa11"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["none"], "token: the store has no token 'none'"),
        ([""], "token: is empty; give its id"),
        ([], "token: expected tokens or their ids, or else --all"),
        (["one", "--all"], "token: expected tokens or their ids, or else --all"),
    ],
)
def test_a_token_that_is_none_revokes_nothing(
    url: str,
    devices: DeviceStore,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    devices.add_tokens(["one"], 100.0)
    assert _run(url, "revoke-token", *arguments) == 2
    assert problem in capsys.readouterr().err
    assert len(devices.tokens()) == 1


def test_a_token_is_never_taken_for_a_flag(
    url: str, devices: DeviceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all(one["token"].isalnum() for one in _made(url, capsys, "--count", "200"))


def test_looking_makes_no_store(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(url, "list") == 3
    assert "no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
